"""A tensor kept on disk in parts of known sizes: each part's place is fixed, its record is written after it.

A part without a whole record, or with other bytes than those recorded, is missing. Two processes may write at once: the
same parts have the same bytes.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from zlib import crc32

RECORD = struct.Struct("<II")  # crc32 of the part, and its complement: a gap in the file is no record
ALIGNED = 8  # bytes


STATES = "states.safetensors"


class Store:
    """A folder with the tensor, in safetensors' form, and a record for each part (`index`).

    `sizes`: bytes of each part; `dtype`, as that form names it, and `shape`: of the whole.
    """

    def __init__(self, folder: Path, sizes: Sequence[int], dtype: str, shape: Sequence[int]) -> None:
        self.folder = folder
        self.sizes = sizes
        self.head = _head(dtype, shape, sum(sizes))
        self.starts = [*accumulate(sizes, initial=len(self.head))]  # the last: of a part that would follow

    def missing(self) -> list[int]:
        """The parts that are not there, or are damaged."""
        everything = range(len(self.sizes))
        try:
            records = (self.folder / "index").read_bytes().ljust(len(self.sizes) * RECORD.size, b"\0")
            with (self.folder / STATES).open("rb") as states:
                if states.read(len(self.head)) != self.head:
                    return list(everything)
                found = [RECORD.pack(check, ~check & 0xFFFFFFFF) for check in map(crc32, map(states.read, self.sizes))]
        except OSError:
            return list(everything)
        return [part for part in everything if found[part] != records[part * RECORD.size :][: RECORD.size]]

    def write(self, part: int, content: bytes) -> None:
        """Keep a part. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        check = crc32(content)
        _write(self.folder / STATES, (0, self.head), (self.starts[part], content))
        _write(self.folder / "index", (part * RECORD.size, RECORD.pack(check, ~check & 0xFFFFFFFF)))

    def mapped(self) -> mmap.mmap:
        """The file, of which no part may be missing, read as it is asked for. Raises OSError, ValueError."""
        with (self.folder / STATES).open("rb") as file:
            return mmap.mmap(file.fileno(), self.starts[-1], access=mmap.ACCESS_READ)


def _head(dtype: str, shape: Sequence[int], size: int) -> bytes:
    """The length of what follows, and that: where the tensor lies. Padded, so that its numbers are aligned."""
    told = json.dumps({"states": {"dtype": dtype, "shape": [*shape], "data_offsets": [0, size]}}).encode()
    told = told.ljust(-(-len(told) // ALIGNED) * ALIGNED)
    return len(told).to_bytes(8, "little") + told


def _write(path: Path, *pieces: tuple[int, bytes]) -> None:
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
        for at, content in pieces:
            file.seek(at)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
