"""The rows of a source on their way to be encoded, some at a time, and how far they have come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice

from peftctl.data.encoding import Given
from peftctl.data.sources import Part, code, empty, records

HEAD = 1024  # rows whose columns decide what a source holds
ROWS, BYTES = 256, 1 << 20  # most of a batch that is encoded together
LONG = 2.0  # seconds of work that are worth a second process


class Reading:
    """The first `limit` rows of all parts, in order."""

    def __init__(self, name: str, parts: Sequence[Part], limit: int | None) -> None:
        self.name = name
        self.parts = parts
        self.limit = limit
        self.totals = [part.total() for part in parts]
        self.part, self.offset, self.read = 0, 0, 0
        self.given = self._rows()

    def head(self) -> list[Given]:
        """The first rows, with as many faults as there are before them. Raises DataError where there is nothing."""
        found: list[Given] = []
        usable = False
        for given in self.given:
            found.append(given)
            usable |= isinstance(given[1], dict)
            if usable and (len(found) >= HEAD or self.offset >= 8 * BYTES):
                break
        if not found:
            raise empty(self.name)
        return found

    def batches(self, head: Sequence[Given]) -> Iterator[list[Given]]:
        """All rows, `head` among them."""
        batch: list[Given] = []
        begun = self.part, self.offset
        for given in chain(head, self.given):
            batch.append(given)
            if len(batch) >= ROWS or self.part > begun[0] or self.offset - begun[1] >= BYTES:
                yield batch
                batch, begun = [], (self.part, self.offset)
        if batch:
            yield batch

    def expected(self) -> int | None:
        """Rows in all, as far as can be guessed from those that were read."""
        total = self.totals[self.part]
        if total is None or not self.read:
            return self.limit
        share = (self.part + min(1.0, self.offset / max(total, 1))) / len(self.parts)
        guess = round(self.read / share) if share else self.read
        return guess if self.limit is None else min(guess, self.limit)

    def long(self, spent: float, done: int) -> bool:
        """Whether the rest is long work, when `done` rows took so many seconds."""
        expected = self.expected()
        return expected is None or (expected - done) * spent / max(done, 1) > LONG

    def _rows(self) -> Iterator[Given]:
        for number, record in islice(records(self.parts), self.limit):
            self.part, self.offset = number, record.after.offset
            self.read += 1
            yield code(number, record.line), record.row
