"""Hidden states kept on disk in parts of known sizes: each part's place is fixed, its record is written after it.

A part without a whole record, or with other bytes than those recorded, is missing. Two processes may write at once: the
same parts have the same bytes.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from zlib import crc32

RECORD = struct.Struct("<II")  # crc32 of the part, and its complement: a gap in the file is no record


class Store:
    """A folder with the raw bytes (`states`) and a record for each part (`index`). `sizes`: bytes of each part."""

    def __init__(self, folder: Path, sizes: Sequence[int]) -> None:
        self.folder = folder
        self.sizes = sizes
        self.starts = [0, *accumulate(sizes)]  # the last: of a part that would follow

    def missing(self) -> list[int]:
        """The parts that are not there, or are damaged."""
        everything = range(len(self.sizes))
        try:
            records = (self.folder / "index").read_bytes().ljust(len(self.sizes) * RECORD.size, b"\0")
            with (self.folder / "states").open("rb") as states:
                found = [RECORD.pack(check, ~check & 0xFFFFFFFF) for check in map(crc32, map(states.read, self.sizes))]
        except OSError:
            return list(everything)
        return [part for part in everything if found[part] != records[part * RECORD.size :][: RECORD.size]]

    def write(self, part: int, content: bytes) -> None:
        """Keep a part. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        check = crc32(content)
        _write(self.folder / "states", self.starts[part], content)
        _write(self.folder / "index", part * RECORD.size, RECORD.pack(check, ~check & 0xFFFFFFFF))

    def mapped(self) -> mmap.mmap:
        """All parts, of which none may be missing, read as they are asked for. Raises OSError, ValueError."""
        with (self.folder / "states").open("rb") as file:
            return mmap.mmap(file.fileno(), self.starts[-1], access=mmap.ACCESS_READ)


def _write(path: Path, at: int, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
        file.seek(at)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
