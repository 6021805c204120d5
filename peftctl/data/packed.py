"""Encoded examples as plain numbers: the tokens of all rows one after the other, and tables that find a row's.

A row's bytes are its ids (32 bits each), its weights (a byte each where all are 0 or 1, else 64 bits), and what else it
holds, as JSON.
"""

from __future__ import annotations

import json
import os
import weakref
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from peftctl.data.encoded import Examples, digest
from peftctl.row import Row

TABLES = {"tokens": "I", "kinds": "B", "ends": "Q", "counts": "I", "places": "Q", "digests": "Q"}
MORE = tuple(name for name in Row._fields if name not in ("ids", "weights", "example", "role"))

Read = Callable[[int, int], bytes]  # from, to


class Packed:
    """The tables of encoded examples; their rows' bytes lie elsewhere.

    Of each row: `tokens`, `kinds` (the number of its role, doubled, and whether its weights are wide), `ends`, where
    its bytes end. Of each example: `counts`, its rows, `places`, a number for whoever made it, and `digests`, by which
    equal ones are told.
    """

    def __init__(self, roles: Iterable[str] = (), tables: Iterable[array[int]] | None = None) -> None:
        self.roles = list(roles)
        self.tables = list(tables or map(array, TABLES.values()))
        self.tokens, self.kinds, self.ends, self.counts, self.places, self.digests = self.tables

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return self.ends[-1] if self.ends else 0

    def add(self, rows: Sequence[Row], place: int) -> bytes:
        """Note one more example; answers its rows' bytes."""
        contents = []
        for row in rows:
            narrow = {*row.weights} <= {0.0, 1.0}
            weights = bytes(map(int, row.weights)) if narrow else array("d", row.weights).tobytes()
            contents.append(array("I", row.ids).tobytes() + weights + _more(row))
            self.tokens.append(len(row.ids))
            self.kinds.append(2 * self._role(row.role) + (not narrow))
            self.ends.append(self.size + len(contents[-1]))
        self.counts.append(len(rows))
        self.places.append(place)
        self.digests.append(digest(rows))
        return b"".join(contents)

    def extend(self, other: Packed) -> None:
        """Note another's examples; its bytes come after these."""
        start, numbers = self.size, [self._role(role) for role in other.roles]
        self.tokens.extend(other.tokens)
        self.kinds.extend(2 * numbers[kind // 2] + kind % 2 for kind in other.kinds)
        self.ends.extend(start + end for end in other.ends)
        self.counts.extend(other.counts)
        self.places.extend(other.places)
        self.digests.extend(other.digests)

    def examples(self, read: Read) -> Examples:
        """All examples; `read` answers some of their rows' bytes."""
        until = array("Q", accumulate(self.counts))

        def rows_of(index: int) -> range:
            return range(until[index - 1] if index else 0, until[index])

        def rows(index: int) -> tuple[Row, ...]:
            own = rows_of(index)
            start = self._start(own[0]) if own else 0
            content = read(start, self.ends[own[-1]]) if own else b""
            return tuple(
                self._row(row, content[self._start(row) - start : self.ends[row] - start], index) for row in own
            )

        def lengths(index: int) -> list[int]:
            return [self.tokens[row] for row in rows_of(index)]

        return Examples(len(self.counts), rows, lengths, self.digests.__getitem__)

    def _row(self, row: int, content: bytes, example: int) -> Row:
        count, kind = self.tokens[row], self.kinds[row]
        middle = 4 * count
        end = middle + (8 * count if kind % 2 else count)
        values = array("d", content[middle:end]) if kind % 2 else map(float, content[middle:end])
        more = _unpacked(content[end:]) if len(content) > end else {}
        return Row(tuple(array("I", content[:middle])), tuple(values), example, self.roles[kind // 2], **more)

    def _start(self, row: int) -> int:
        return self.ends[row - 1] if row else 0

    def _role(self, role: str) -> int:
        if role not in self.roles:
            self.roles.append(role)
        return self.roles.index(role)


def tables_of(lengths: Sequence[int], read: Callable[[int], bytes]) -> list[array[int]]:
    """Tables from their lengths in bytes and what reads so many more. Raises ValueError."""
    return [array(code, read(size)) for code, size in zip(TABLES.values(), lengths, strict=True)]


def reading(path: Path) -> Read:
    """Reads a file's bytes without mapping them, so that what was read is no memory of this process."""
    descriptor = os.open(path, os.O_RDONLY)

    def read(start: int, end: int) -> bytes:
        return os.pread(descriptor, end - start, start)

    weakref.finalize(read, os.close, descriptor)
    return read


def _more(row: Row) -> bytes:
    """What a row holds beside the fields that have tables, where that is anything."""
    defaults = Row._field_defaults
    more = {name: value for name in MORE if (value := getattr(row, name)) != defaults[name]}
    return json.dumps(more).encode() if more else b""


def _unpacked(content: bytes) -> dict[str, Any]:
    more = json.loads(content)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in more.items()}
