"""Reading files of examples, each row with its place; what cannot be read has a reason.

A bad row is a `Fault`, not an exception, so that the caller can refuse the file or leave the row out; a file that is
no data file at all raises DataError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from peftctl.data.sources.files import File, files, fingerprint, shown
from peftctl.data.sources.records import Cells, Fault, Json, Record
from peftctl.data.sources.table import spelled
from peftctl.errors import DataError

__all__ = ["Cells", "Fault", "File", "Json", "Source", "files", "fingerprint", "read", "records", "shown", "spelled"]


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
    found, name = files(path), shown(Path(path))
    rows: list[tuple[str, Json]] = []
    faults: list[Fault] = []
    for file, record in islice(records(found), limit):
        place = file.place(record.line)
        rows.append((place, record.row)) if isinstance(record.row, dict) else faults.append(Fault(place, record.row))
    if not rows and not faults:
        raise empty(name)
    return Source(name, rows, faults, fingerprint([file.path for file in found]))


def records(files: Sequence[File]) -> Iterator[tuple[File, Record]]:
    """The rows of all files in turn. Raises DataError."""
    for file in files:
        try:
            for record in file.reader(file.path, file.name):
                yield file, record
        except OSError as error:
            raise DataError(f"data file {file.name} cannot be read: {error.strerror or error}") from None


def empty(name: str) -> DataError:
    return DataError(f"{name}: the file is empty: there is no row in it")
