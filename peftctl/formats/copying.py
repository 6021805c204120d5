"""Bytes of one open file copied to the end of another: by the kernel where it can, so that none pass through here.

Torch-free.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import BinaryIO

BLOCK = 8 << 20  # bytes of a read, where the kernel does not copy
LARGEST = 1 << 30  # bytes asked of the kernel at once, so that a signal does not wait for long
# how a kernel, or a file system, says that it does not copy between these two files
UNSERVED = frozenset(
    {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.ENOTSOCK}
)

Step = Callable[[int, int, int, int], int]  # source, target, offset, bytes wanted -> bytes copied


def copy_range(source: BinaryIO, out: BinaryIO, start: int, size: int) -> int:
    """Append `size` bytes of `source`, from `start` on, to what was written to `out`; gives how many there were.

    Fewer than asked for where the source ends before. Raises OSError.
    """
    out.flush()
    copied = 0
    for step in (_range, _sent):
        copied += _repeated(step, source.fileno(), out.fileno(), start + copied, size - copied)
    source.seek(start + copied)
    while copied < size and (block := source.read(min(BLOCK, size - copied))):
        out.write(block)
        copied += len(block)
    return copied


def _repeated(step: Step, source: int, target: int, start: int, size: int) -> int:
    """Bytes that the kernel copied: all of them, those up to the source's end, or fewer where it does not serve."""
    copied = 0
    while copied < size:
        try:
            count = step(source, target, start + copied, min(LARGEST, size - copied))
        except OSError as error:
            if error.errno in UNSERVED:
                break
            raise
        if not count:
            break
        copied += count
    return copied


def _range(source: int, target: int, start: int, size: int) -> int:
    """May share the blocks on the disk, where the file system can."""
    if not hasattr(os, "copy_file_range"):
        return 0
    return os.copy_file_range(source, target, size, start)


def _sent(source: int, target: int, start: int, size: int) -> int:
    if not hasattr(os, "sendfile"):
        return 0
    return os.sendfile(target, source, start, size)
