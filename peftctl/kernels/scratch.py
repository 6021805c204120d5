"""The buffer that narrow weights are widened into for a product, a matrix or a block of a large one at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 25  # weights widened at once: a larger matrix is multiplied in blocks of rows, so the scratch stays small


class Scratch(threading.local):
    """One buffer a thread, device and type. Its content is valid until the next call.

    It remembers what it holds: a head is multiplied by many chunks of rows in turn, and widened for the first alone.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.content: dict[tuple[torch.device, torch.dtype], tuple[Any, ...]] = {}
        self.copies: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}  # see `stored.wide_copies`

    def widen(self, inner: Tensor, dtype: torch.dtype) -> Tensor:
        if self.copies and (copy := self.copies.get((inner.data_ptr(), inner.shape, dtype))) is not None:
            return copy
        place = (inner.device, dtype)
        buffer, size = self.buffers.get(place), inner.numel()
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[place] = torch.empty(size, dtype=dtype, device=inner.device)
            self.content.pop(place, None)
        wide = buffer[:size].view(inner.shape)
        # `inner` is held, so that no other weight can come to lie at its address
        content = (inner.data_ptr(), inner.shape, inner._version, inner.untyped_storage())
        before = self.content.get(place)
        if before is None or before[:3] != content[:3]:
            wide.copy_(inner)
            self.content[place] = content
        return wide


scratch = Scratch()


def blocks(matrix: Tensor) -> Iterator[slice]:
    """Slices of the rows, of like size, with at most `BLOCK` elements each."""
    count = -(-matrix.numel() // BLOCK)
    size = -(-len(matrix) // count)
    return (slice(start, start + size) for start in range(0, len(matrix), size))


def operands(matrices: Tensor) -> Iterator[Tensor]:
    """What `product` widens of a matrix, or of several, one by one: the whole, or blocks of rows."""
    if matrices.ndim > 2:
        for matrix in matrices:
            yield from operands(matrix)
    elif matrices.numel() <= BLOCK:
        yield matrices
    else:
        yield from (matrices[rows] for rows in blocks(matrices))
