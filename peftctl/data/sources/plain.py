"""Plain text: every line that is not blank is a row of one column, `text`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from peftctl.data.sources.lines import lines, text
from peftctl.data.sources.records import START, Json, Mark, Record
from peftctl.errors import DataError


def rows(path: Path, name: str, start: Mark = START) -> Iterator[Record]:
    for line in lines(path, name, start):
        if isinstance(line, Record):
            yield line
        elif line.content.strip():
            yield Record(line.number, _row(line.content), line.after)


def _row(line: bytes) -> Json | str:
    if b"\0" in line:
        return f"a NUL character at byte {line.index(0) + 1} of the line"
    try:
        return {"text": text(line)}
    except DataError as error:
        return str(error)
