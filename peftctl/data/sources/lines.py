"""The lines of a file, plain or compressed with gzip: bounded in length, each with its number and where it ends."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

from peftctl.data.sources.records import START, Mark, Record, too_long
from peftctl.errors import DataError

LONGEST = 16 << 20  # bytes of a line; one that is longer is no row, and is never held whole
BOM, OTHER_BOMS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
ZIPPED = ".gz"
CUT_OFF = "the gzip file breaks off or is damaged here"


class Line(NamedTuple):
    number: int
    content: bytes
    after: Mark


def opened(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed where its name ends in `.gz`."""
    file = gzip.open(path) if path.suffix.lower() == ZIPPED else open(path, "rb")
    return cast("IO[bytes]", file)


def lines(path: Path, name: str, start: Mark = START) -> Iterator[Line | Record]:
    """The lines from a mark on, without a byte order mark; in place of one that cannot be read, a record that says why.

    Only \\n ends a line, never U+2028. Raises DataError for UTF-16.
    """
    with opened(path) as file:
        offset, number = start
        try:
            file.seek(offset)
            while line := file.readline(LONGEST + 1):
                number += 1
                size = len(line) if len(line) <= LONGEST else len(line) + _rest(file, line)
                offset += size
                if offset == size:
                    line = _opening(line, name)
                after = Mark(offset, number)
                yield Line(number, line, after) if size <= LONGEST else Record(number, too_long(LONGEST), after)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            yield Record(number + 1, CUT_OFF, Mark(offset, number + 1))


def text(line: bytes) -> str:
    """A line as text, without its end. Raises DataError with the reason alone."""
    try:
        return line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"invalid UTF-8 at byte {error.start + 1} of the line") from None


def _rest(file: IO[bytes], line: bytes) -> int:
    """Bytes up to the end of a line that was read in part."""
    size = 0
    while not line.endswith(b"\n") and (line := file.readline(1 << 20)):
        size += len(line)
    return size


def _opening(line: bytes, name: str) -> bytes:
    if line.startswith(OTHER_BOMS):
        raise DataError(f"{name} is UTF-16, as its first bytes say; save it as UTF-8")
    return line.removeprefix(BOM)
