"""Sources that are read while training goes on: never whole, from any position, in an order of their own.

The rows of an epoch are cut into windows of `window` neighbours, and each window is shuffled: a buffer that is filled,
shuffled and emptied. A later epoch cuts at other places. So the order is a pure function of seed, epoch and the number
of rows, and to go on at a position takes no more than one window and the rows since the last mark.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from random import Random
from typing import NamedTuple, Protocol

from peftctl.base import cache_folder
from peftctl.data.encoded import Dataset, numbered
from peftctl.data.encoding import Given, Job, pieces
from peftctl.data.marks import Marks
from peftctl.data.order import PAIRED, dealt, order, shuffled
from peftctl.data.sources import LINE, Json, Part, code, place
from peftctl.data.sources.records import START
from peftctl.errors import DataError
from peftctl.row import Row

EVERY = 1000  # rows between marks
BLOCK = 1000  # rows among which each of several sources has its share

Pair = Callable[[Sequence[tuple[Row, ...]], Sequence[int]], Sequence[tuple[Row, ...]]]


class Feed(NamedTuple):
    """One of the sources that are streamed. `limit`: of its rows the first ones alone."""

    name: str
    parts: Sequence[Part]
    job: Job
    limit: int | None = None

    @property
    def fingerprint(self) -> str:
        """The sha256 of its parts' samples, in hex."""
        return hashlib.sha256("".join(part.sample() for part in self.parts).encode()).hexdigest()


class Drawn(NamedTuple):
    """A row of a stream, or why it is none; where it stands; and what encodes it."""

    place: str
    row: Json | str
    job: Job


class Rows(Protocol):
    """Rows by position, without an end."""

    def at(self, position: int) -> Drawn: ...

    def round(self) -> int:
        """So many neighbouring positions have every row among them; 0 while nobody knows how many rows there are."""


class Windows:
    """Feeds one after the other, shuffled in windows: the rows of the endless concatenation of epochs."""

    def __init__(self, feeds: Sequence[Feed], seed: int, window: int) -> None:
        self.feeds = feeds
        self.seed = seed
        self.window = window
        self.parts = [part for feed in feeds for part in feed.parts]
        self.owners = [number for number, feed in enumerate(feeds) for _ in feed.parts]
        self.stems = [part.stem for part in self.parts]
        self.marks = Marks(cache_folder() / "streams" / _key(feeds), len(self.parts))
        self.next = 0  # the row that `reader` reads next
        self.reader = self._read(0)
        self.cached = lru_cache(maxsize=2)(self._shuffled)

    def at(self, position: int) -> Drawn:
        epoch, row = divmod(position, self.marks.rows) if self.marks.rows else (0, position)
        shift = _shift(self.seed, epoch, self.window)
        number = (row + shift) // self.window
        start = max(0, number * self.window - shift)
        rows = self.cached(epoch, start, (number + 1) * self.window - shift)
        if row - start >= len(rows):
            return self.at(position)  # the source has ended meanwhile: now it is known how many rows an epoch has
        where, found = rows[row - start]
        return Drawn(place(self.stems, where), found, self.feeds[self.owners[where >> LINE]].job)

    def round(self) -> int:
        return self.marks.rows

    def _shuffled(self, epoch: int, start: int, end: int) -> list[Given]:
        """A window's rows as they come."""
        if start != self.next:
            self.reader, self.next = self._read(start), start
        rows = list(islice(self.reader, end - start))
        self.next += len(rows)
        return shuffled(rows, f"peftctl stream, seed {self.seed}, epoch {epoch}, from {start}")

    def _read(self, start: int) -> Iterator[Given]:
        """The rows from one on, to the end of the last feed."""
        row, first, mark, own = self.marks.before(start)
        for number in range(first, len(self.parts)):
            if number > first and self.owners[number] != self.owners[number - 1]:
                own = 0
            limit = self.feeds[self.owners[number]].limit
            for record in islice(self.parts[number].records(mark), None if limit is None else limit - own):
                if row >= start:
                    yield code(number, record.line), record.row
                row, own = row + 1, own + 1
                if row % EVERY == 0:
                    self.marks.note(row, number, record.after, own)
            mark = START
        self.marks.end(row)


class Mixed:
    """Several sources by weight: of every 1,000 rows each has its share, in an order that seed and place decide."""

    def __init__(self, sources: Sequence[Rows], names: Sequence[str], weights: Sequence[float], seed: int) -> None:
        """Raises DataError for a weight that gives a source nothing."""
        self.sources = sources
        self.counts = dealt(weights, BLOCK)
        for name, weight, count in zip(names, weights, self.counts, strict=True):
            if not count:
                raise DataError(f"{name}: weight {weight:g} gives it none of {BLOCK:,} rows")
        self.seed = seed
        self.cached = lru_cache(maxsize=2)(self._block)

    def at(self, position: int) -> Drawn:
        block, slot = divmod(position, BLOCK)
        source, number = self.cached(block)[slot]
        return self.sources[source].at(block * self.counts[source] + number)

    def round(self) -> int:
        rows = [source.round() for source in self.sources]
        return (1 + max(n // count for n, count in zip(rows, self.counts, strict=True))) * BLOCK if all(rows) else 0

    def _block(self, block: int) -> list[tuple[int, int]]:
        """Of each of its rows the source, and how many of that source come before it here."""
        mixed = [source for source, count in enumerate(self.counts) for _ in range(count)]
        seen = [0] * len(self.counts)
        found: list[tuple[int, int]] = []
        for source in shuffled(mixed, f"peftctl mix, seed {self.seed}, block {block}"):
            found.append((source, seen[source]))
            seen[source] += 1
        return found


class Stream:
    """The examples of rows by position: the rows consumed so far.

    `skip`: whether rows that cannot be used are passed over; else they raise DataError. `held`: the places of rows that
    are held out. `pair`: what the examples that are taken together get of each other, as an objective has it.
    """

    def __init__(
        self,
        name: str,
        fingerprint: str,
        rows: Rows,
        seed: int,
        skip: bool,
        held: Collection[str] = (),
        pair: Pair | None = None,
    ) -> None:
        self.name = name
        self.fingerprint = fingerprint
        self.rows = rows
        self.seed = seed
        self.skip = skip
        self.held = frozenset(held)
        self.pair = pair

    def take(self, position: int, count: int) -> tuple[Dataset, int]:
        """So many examples from a position on, and the position after them. Raises DataError."""
        found: list[tuple[Row, ...]] = []
        places: list[str] = []
        passed = 0
        while len(found) < count:
            drawn = self.rows.at(position)
            position += 1
            rows = self._usable(drawn)
            if isinstance(rows, str):
                passed += 1
                if 0 < self.rows.round() <= passed:
                    raise DataError(f"{self.name}: no row can be used; one is {drawn.place}: {rows}")
                continue
            found.append(numbered(rows, len(found)))
            places.append(drawn.place)
            passed = 0
        examples = found if self.pair is None else self.pair(found, order(len(found), self.seed, PAIRED))
        return Dataset(self.name, tuple(examples), tuple(places), self.fingerprint), position

    def _usable(self, drawn: Drawn) -> tuple[Row, ...] | str:
        """The rows of an example, or why it is passed over. Raises DataError where that is not to be."""
        if drawn.place in self.held:
            return "it is held out"
        try:
            [rows], _ = pieces(drawn.job, drawn.row)
        except DataError as error:
            if not self.skip:
                raise DataError(f"{drawn.place}: {error}; data.on_bad_row: skip leaves such rows out") from None
            return str(error)
        return rows


def _key(feeds: Sequence[Feed]) -> str:
    """What the marks of feeds are kept by."""
    told = [(feed.fingerprint, feed.limit) for feed in feeds]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _shift(seed: int, epoch: int, window: int) -> int:
    """Rows that an epoch's first window lacks."""
    return int(Random(f"peftctl stream, seed {seed}, epoch {epoch}").random() * window) if epoch else 0
