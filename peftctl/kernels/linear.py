"""Frozen linears that share their input, with their low-rank products, as one autograd function.

The input is saved once for all of them. The backward pass multiplies in the order that keeps every intermediate result
a rank wide, and takes no gradient of a frozen weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftctl.kernels.matrix import Matrix
from peftctl.kernels.onednn import linear


class Product(NamedTuple):
    """A change of a linear's output by scale * B A x: a (rank, in), b (out, rank), of whatever dtype."""

    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0  # on x, in training


class Group:
    """Linears of one input and what is added to each (None for nothing), for one pass.

    `forward` and `backward` are what an autograd function of it does; a larger one can be made of several.
    """

    def __init__(
        self, matrices: Sequence[Matrix], products: Sequence[Product | None], dtype: torch.dtype, training: bool
    ) -> None:
        self.matrices = matrices
        self.places = [i for i, p in enumerate(products) if p is not None]
        self.products = [p for p in products if p is not None]
        self.ranks = [len(p.a) for p in self.products]
        self.dropout = training and any(p.dropout for p in self.products)
        # cast anew for each pass: the fused optimizers write to a parameter without its version telling so
        self.a = torch.cat([p.a.detach() for p in self.products]).to(dtype) if self.products else None
        self.b = [p.b.detach().to(dtype) for p in self.products]

    @property
    def factors(self) -> list[Tensor]:
        """What is trained, in the order of `backward`'s gradients."""
        return [t for p in self.products for t in (p.a, p.b)]

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """x (n, in) -> each (n, out); and what `backward` needs beside x."""
        outs = [matrix.forward(x) for matrix in self.matrices]
        if self.a is None:
            return outs, []
        lows, masks = self._lowered(x, self.a)
        for place, p, low, b in zip(self.places, self.products, lows, self.b, strict=True):
            outs[place].addmm_(low, b.T, alpha=p.scale)
        return outs, [*lows, *masks]

    def _lowered(self, x: Tensor, a: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """A x of each product, (n, rank), and the masks of dropout, where there is any."""
        if not self.dropout:
            return list(linear(x, a).split_with_sizes(self.ranks, dim=1)), []
        dropped, masks = zip(*(torch.native_dropout(x, p.dropout, True) for p in self.products), strict=True)
        return [linear(d, part) for d, part in zip(dropped, a.split_with_sizes(self.ranks), strict=True)], list(masks)

    def backward(
        self, x: Tensor | None, slopes: Sequence[Tensor], saved: Sequence[Tensor], wanted: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """The gradients of x, if `wanted`, and of each factor, from the outputs' own. x may be None without factors."""
        dx = None
        if wanted:
            for matrix, slope in zip(self.matrices, slopes, strict=True):
                dx = matrix.backward(slope, dx)
        if self.a is None or x is None:
            return dx, []
        own = [slopes[place] for place in self.places]
        lows, masks = saved[: len(own)], saved[len(own) :]
        # the narrow side first: on the CPU the other order costs up to twice as much
        db = [(low.T @ slope).mul_(p.scale).T for slope, low, p in zip(own, lows, self.products, strict=True)]
        inner = [(slope @ b).mul_(p.scale) for slope, b, p in zip(own, self.b, self.products, strict=True)]
        if masks:
            dx, da = self._through_dropout(x, self.a, inner, masks, dx)
        else:
            stacked = inner[0] if len(inner) == 1 else torch.cat(inner, dim=1)
            da = list((stacked.T @ x).split_with_sizes(self.ranks))
            dx = dx.addmm_(stacked, self.a) if dx is not None else None
        pairs = zip(self.products, da, db, strict=True)
        grads = [(g, t.dtype) for p, *both in pairs for g, t in zip(both, (p.a, p.b), strict=True)]
        return dx, [g.to(dtype, memory_format=torch.contiguous_format) for g, dtype in grads]

    def _through_dropout(
        self, x: Tensor, a: Tensor, inner: Sequence[Tensor], masks: Sequence[Tensor], dx: Tensor | None
    ) -> tuple[Tensor | None, list[Tensor]]:
        da = []
        for low, mask, part, p in zip(inner, masks, a.split_with_sizes(self.ranks), self.products, strict=True):
            kept = (mask / (1 - p.dropout)).to(x.dtype)
            da.append(low.T @ (x * kept))
            dx = dx + (low @ part) * kept if dx is not None else None
        return dx, da


def linears(
    x: Tensor, matrices: Sequence[Matrix], products: Sequence[Product | None], training: bool
) -> tuple[Tensor, ...]:
    """x (..., in) -> one (..., out) for each matrix, with its product where it has one."""
    group = Group(matrices, products, x.dtype, training)
    flat = x.reshape(-1, x.shape[-1])
    outs: tuple[Tensor, ...] = _Linears.apply(flat, group, *group.factors)  # type: ignore[no-untyped-call]
    return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outs)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, *factors: Tensor) -> tuple[Tensor, ...]:
        outs, saved = group.forward(x)
        ctx.group = group
        ctx.save_for_backward(*((x, *saved) if factors else ()))
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors or (None,)
        dx, grads = ctx.group.backward(x, slopes, saved, ctx.needs_input_grad[0])
        return dx, None, *grads


def plain_linears(
    x: Tensor, matrices: Sequence[Matrix], products: Sequence[Product | None], training: bool
) -> tuple[Tensor, ...]:
    """The plain twin, by autograd."""
    return tuple(_plain(x, m, p, training) for m, p in zip(matrices, products, strict=True))


def _plain(x: Tensor, matrix: Matrix, product: Product | None, training: bool) -> Tensor:
    y = F.linear(x, matrix.out_in, matrix.bias)
    if product is None:
        return y
    dropped = F.dropout(x, product.dropout, training)
    return y + dropped @ product.a.to(x.dtype).T @ product.b.to(x.dtype).T * product.scale
