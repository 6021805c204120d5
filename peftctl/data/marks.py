"""Where some rows of a source begin, and how many there are once that is known: kept on disk for the next run."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from peftctl.data.sources import Mark
from peftctl.data.sources.records import START


class Known(NamedTuple):
    """Where a row begins: its number, its part, the mark there, and how many rows of its feed come before it."""

    row: int
    part: int
    mark: Mark
    own: int


class Marks:
    """The marks of a source of so many parts. What cannot be kept is found anew, which takes longer."""

    def __init__(self, path: Path, parts: int) -> None:
        self.path = path
        self.parts = parts
        self.rows = 0  # of the whole source; 0 until its end was seen
        self.known = [Known(0, 0, START, 0)]
        for row, part, offset, line, own in _lines(path):
            if part == parts:
                self.rows = row
            elif row > self.known[-1].row:
                self.known.append(Known(row, part, Mark(offset, line), own))

    def before(self, row: int) -> Known:
        """The last known row that does not come after one."""
        return self.known[bisect_right(self.known, row, key=lambda known: known.row) - 1]

    def note(self, row: int, part: int, mark: Mark, own: int) -> None:
        if row > self.known[-1].row:
            self.known.append(Known(row, part, mark, own))
            self._append(row, part, *mark, own)

    def end(self, row: int) -> None:
        if not self.rows:
            self.rows = row
            self._append(row, self.parts, *START, 0)

    def _append(self, *numbers: int) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(f"{json.dumps(numbers)}\n")
        except OSError:
            pass


def _lines(path: Path) -> Iterator[list[int]]:
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
        if not (isinstance(found, list) and len(found) == 5 and all(isinstance(number, int) for number in found)):
            return
        yield found
