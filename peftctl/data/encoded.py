"""Encoded examples of a file, and the report on what became of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from peftctl.data.sources import Fault
from peftctl.row import Row


@dataclass(frozen=True)
class Dataset:
    """Encoded examples: of each its rows (a pair has two), whose `example` is its index here, and its place."""

    name: str
    examples: tuple[tuple[Row, ...], ...]
    places: tuple[str, ...]
    fingerprint: str  # sha256 of the file

    def __len__(self) -> int:
        return len(self.examples)

    def rows(self, indices: Sequence[int]) -> list[Row]:
        """The rows of these examples, in order."""
        return list(chain.from_iterable(self.examples[index] for index in indices))

    def sizes(self, padded: bool = False) -> list[int]:
        """Of each example, its rows' tokens; `padded`: as a rectangle, each row as long as the example's longest."""
        lengths = [[len(row.ids) for row in rows] for rows in self.examples]
        return [len(own) * max(own) if padded else sum(own) for own in lengths]

    def subset(self, indices: Sequence[int]) -> Dataset:
        """These examples alone, numbered anew."""
        chosen = [tuple(row._replace(example=new) for row in self.examples[old]) for new, old in enumerate(indices)]
        return Dataset(self.name, tuple(chosen), tuple(self.places[i] for i in indices), self.fingerprint)


class Report(NamedTuple):
    """What became of a file's rows. Tokens are counted in all rows of the kept examples."""

    name: str
    kind: str
    read: int
    kept: int
    refused: int
    faults: tuple[Fault, ...]  # the first ten
    tokens: int
    labelled_tokens: int
    unlabelled: int  # examples refused because no token of theirs would be learnt
    ended: int  # kept rows whose last label is an end token; far fewer than rows: the model will not learn to stop
    longest: int
    unused: tuple[str, ...]  # columns that nothing reads
