"""A source that is read while training goes on: never whole, from any position, in an order of its own.

The rows of an epoch are cut into windows of `window` neighbours, and each window is shuffled: a buffer that is filled,
shuffled and emptied. A later epoch cuts at other places. So the order is a pure function of seed, epoch and the number
of rows, and to go on at a position takes no more than one window and the rows since the last mark.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from peftctl.base import cache_folder
from peftctl.data.encoded import Dataset, numbered
from peftctl.data.encoding import Given, Job, pieces
from peftctl.data.order import shuffled
from peftctl.data.sources import Mark, Part, Record, code, place
from peftctl.errors import DataError
from peftctl.row import Row

EVERY = 1000  # rows between marks


class Stream:
    """The examples of a source by position: the rows consumed so far, in the endless concatenation of epochs.

    `skip`: whether rows that cannot be used are passed over; else they raise DataError.
    """

    def __init__(self, name: str, parts: Sequence[Part], job: Job, seed: int, window: int, skip: bool) -> None:
        self.name = name
        self.parts = parts
        self.stems = [part.stem for part in parts]
        self.job = job
        self.seed = seed
        self.window = window
        self.skip = skip
        self.fingerprint = hashlib.sha256("".join(part.sample() for part in parts).encode()).hexdigest()
        self.marks = Marks(cache_folder() / "streams" / self.fingerprint, len(parts))
        self.next = 0  # the row that `reader` reads next
        self.reader = self._read(0)
        self.cached = lru_cache(maxsize=2)(self._shuffled)

    def take(self, position: int, count: int) -> tuple[Dataset, int]:
        """So many examples from a position on, and the position after them. Raises DataError."""
        found: list[tuple[Row, ...]] = []
        places: list[str] = []
        refused = 0
        while len(found) < count:
            where, row = self._at(position)
            position += 1
            try:
                [rows], _ = pieces(self.job, row)
            except DataError as error:
                refused += 1
                told = place(self.stems, where)
                if not self.skip:
                    raise DataError(f"{told}: {error}; data.on_bad_row: skip leaves such rows out") from None
                if refused == self.marks.rows:
                    raise DataError(f"{self.name}: no row can be used; one is {told}: {error}") from None
                continue
            found.append(numbered(rows, len(found)))
            places.append(place(self.stems, where))
            refused = 0
        return Dataset(self.name, tuple(found), tuple(places), self.fingerprint), position

    def _at(self, position: int) -> Given:
        """The row at a position, with its place."""
        epoch, row = divmod(position, self.marks.rows) if self.marks.rows else (0, position)
        shift = _shift(self.seed, epoch, self.window)
        number = (row + shift) // self.window
        start = max(0, number * self.window - shift)
        rows = self.cached(epoch, start, (number + 1) * self.window - shift)
        if row - start < len(rows):
            return rows[row - start]
        return self._at(position)  # the source has ended meanwhile: now it is known how many rows an epoch has

    def _shuffled(self, epoch: int, start: int, end: int) -> list[Given]:
        """A window's rows as they come."""
        if start != self.next:
            self.reader, self.next = self._read(start), start
        rows = list(islice(self.reader, end - start))
        self.next += len(rows)
        return shuffled(rows, f"peftctl stream, seed {self.seed}, epoch {epoch}, from {start}")

    def _read(self, start: int) -> Iterator[Given]:
        """The rows from one on, to the end of the source."""
        row, first, mark = self.marks.before(start)
        for number in range(first, len(self.parts)):
            for record in self.parts[number].records(mark):
                if row >= start:
                    yield code(number, record.line), record.row
                row += 1
                if row % EVERY == 0:
                    self.marks.note(row, number, record)
            mark = Mark(0, 0)
        self.marks.end(row)


class Marks:
    """Where some rows of a source begin, and how many there are once that is known; kept on disk for the next run."""

    def __init__(self, path: Path, parts: int) -> None:
        self.path = path
        self.rows = 0  # of the whole source; 0 until its end was seen
        self.known: list[tuple[int, int, Mark]] = [(0, 0, Mark(0, 0))]
        for number, part, offset, line in _lines(path):
            if part == parts:
                self.rows = number
            elif number > self.known[-1][0]:
                self.known.append((number, part, Mark(offset, line)))
        self.parts = parts

    def before(self, row: int) -> tuple[int, int, Mark]:
        """The last known row that does not come after one, its part and its mark."""
        return self.known[bisect_right(self.known, row, key=lambda known: known[0]) - 1]

    def note(self, row: int, part: int, record: Record) -> None:
        if row > self.known[-1][0]:
            self.known.append((row, part, record.after))
            self._append(row, part, *record.after)

    def end(self, row: int) -> None:
        if not self.rows:
            self.rows = row
            self._append(row, self.parts, 0, 0)

    def _append(self, *numbers: int) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(f"{json.dumps(numbers)}\n")
        except OSError:
            pass  # without it the next run reads from the beginning, and that is all


def _lines(path: Path) -> Iterator[tuple[int, int, int, int]]:
    """The marks in a file, up to what was not written whole."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        try:
            found: Any = json.loads(line)
        except ValueError:
            return
        if not (isinstance(found, list) and len(found) == 4 and all(isinstance(number, int) for number in found)):
            return
        yield found[0], found[1], found[2], found[3]


def _shift(seed: int, epoch: int, window: int) -> int:
    """Rows that an epoch's first window lacks."""
    return int(Random(f"peftctl stream, seed {seed}, epoch {epoch}").random() * window) if epoch else 0
