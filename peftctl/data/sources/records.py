"""What every reader of a file answers: rows with their places, and in place of one that cannot be read, the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

Json = dict[str, Any]


class Mark(NamedTuple):
    """Where reading can begin anew: units before it (bytes once decompressed, or rows), and lines before it."""

    offset: int
    line: int


START = Mark(0, 0)


class Record(NamedTuple):
    """A row, or why it is none; `line` counts from 1 (in files without lines, rows do); `after`: where the next is."""

    line: int
    row: Json | str
    after: Mark


class Reader(Protocol):
    def __call__(self, path: Path, name: str, start: Mark = START) -> Iterator[Record]:
        """The rows of a file from a mark on. Raises DataError for a file that is not of the reader's kind."""


class Part(Protocol):
    """A file, or what is like one. All of it raises DataError where it cannot be read."""

    @property
    def stem(self) -> str:
        """How the places of its rows begin; their line follows."""

    def records(self, start: Mark = START) -> Iterator[Record]:
        """Its rows from a mark on."""

    def bytes(self) -> int:
        """Its size. Raises OSError."""

    def total(self) -> int | None:
        """The offset of the mark at its end, where that is known without reading all of it."""

    def digest(self) -> str:
        """The sha256 of its content. Raises OSError."""

    def sample(self) -> str:
        """The sha256 of its size and of samples of its content, where all of it would take too long."""


class Cells(dict[str, Any]):
    """A row of which every value is a text: what is none elsewhere is spelled out in it."""


class Fault(NamedTuple):
    """A row that cannot be used: where it is and why."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def too_long(longest: int) -> str:
    return f"longer than {longest >> 20} MiB, which no row may be"
