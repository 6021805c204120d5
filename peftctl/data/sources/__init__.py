"""Reading files of examples, each row with its place; what cannot be read has a reason.

A bad row is a `Fault`, not an exception, so that the caller can refuse the file or leave the row out; a file that is
no data file at all raises DataError.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from peftctl.data.sources.files import files, shown
from peftctl.data.sources.records import Cells, Fault, Json, Mark, Part, Record
from peftctl.data.sources.table import spelled
from peftctl.errors import DataError

__all__ = [
    "Cells",
    "Fault",
    "Json",
    "Mark",
    "Part",
    "Record",
    "Source",
    "code",
    "empty",
    "files",
    "fingerprint",
    "place",
]
__all__ += ["read", "records", "shown", "spelled"]

LINE = 40  # bits of a place's number that tell the line; the others tell the part


class Source(NamedTuple):
    """The rows of a file, a folder or a pattern, each with its place, and what is no row."""

    name: str
    rows: list[tuple[str, Json]]
    faults: list[Fault]
    fingerprint: str


def read(path: str | Path, limit: int | None = None) -> Source:
    """The first `limit` rows; blank lines are not counted.

    Raises DataError for a file that is missing, of another kind, or without a row, and for one that cannot be read on.
    """
    parts, name = files(path), shown(Path(path))
    rows: list[tuple[str, Json]] = []
    faults: list[Fault] = []
    for number, record in islice(records(parts), limit):
        where = f"{parts[number].stem}{record.line}"
        rows.append((where, record.row)) if isinstance(record.row, dict) else faults.append(Fault(where, record.row))
    if not rows and not faults:
        raise empty(name)
    return Source(name, rows, faults, fingerprint(parts))


def records(parts: Sequence[Part]) -> Iterator[tuple[int, Record]]:
    """The rows of all parts in turn, each with its part's number. Raises DataError."""
    for number, part in enumerate(parts):
        for record in part.records():
            yield number, record


def fingerprint(parts: Sequence[Part]) -> str:
    """The sha256 of a part's content, in hex; of several, that of theirs."""
    digests = [part.digest() for part in parts]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def code(part: int, line: int) -> int:
    """A row's place as one number; see `place`."""
    return part << LINE | line


def place(stems: Sequence[str], code: int) -> str:
    """The place of a row whose part has one of these stems."""
    return f"{stems[code >> LINE]}{code & (1 << LINE) - 1}"


def empty(name: str) -> DataError:
    return DataError(f"{name}: the file is empty: there is no row in it")
