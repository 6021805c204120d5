"""What a format is: by which columns its rows are told, and how one of them becomes an example."""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import chain
from typing import NamedTuple

from peftctl.data.sources import Json
from peftctl.row import FORMATS, Example


class Format(NamedTuple):
    """`needed`: sets of columns, of which a row has one. `optional`: columns that are read where they are there.

    `described`: for errors, what such rows are. `parse` gets a row under our column names, of which none of the
    needed ones is missing, and raises DataError with the reason alone.
    """

    name: str
    needed: tuple[tuple[str, ...], ...]
    described: str
    parse: Callable[[Json], Example]
    optional: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Of the examples."""
        return FORMATS[self.name]

    @property
    def read(self) -> tuple[str, ...]:
        """All columns that are read."""
        return tuple(dict.fromkeys((*chain.from_iterable(self.needed), *self.optional)))

    def missing(self, names: Collection[str]) -> list[str]:
        """The columns that are not there: of the sets, those of the one that lacks least."""
        return min(([name for name in columns if name not in names] for columns in self.needed), key=len)
