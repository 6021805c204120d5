"""Frozen linears that share their input, with their low-rank products, as one autograd function.

The input is saved once for all of them. The backward pass multiplies in the order that keeps every intermediate result
a rank wide, and takes no gradient of a frozen weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftctl.kernels.matrix import Matrix, thin


class Product(NamedTuple):
    """A change of a linear's output by scale * B A x: a (rank, in), b (out, rank), of whatever dtype."""

    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0  # on x, in training


class Factors(NamedTuple):
    """The factors of some products in the dtype of the computation."""

    a: Tensor  # (ranks, in), one product's under the other's
    b: tuple[Tensor, ...]  # (out, rank) each


def cast(products: Sequence[Product], dtype: torch.dtype) -> Factors:
    """Made anew for each pass: the fused optimizers write to a parameter without its version telling so."""
    stacked = torch.cat([p.a.detach() for p in products]).to(dtype)
    return Factors(stacked, tuple(p.b.detach().to(dtype) for p in products))


def linears(
    x: Tensor, matrices: Sequence[Matrix], products: Sequence[Product | None], training: bool
) -> tuple[Tensor, ...]:
    """x (..., in) -> one (..., out) for each matrix, with its product where it has one."""
    flat = x.reshape(-1, x.shape[-1])
    there = [p for p in products if p is not None]
    factors = [t for p in there for t in (p.a, p.b)]
    outs: tuple[Tensor, ...] = _Linears.apply(  # type: ignore[no-untyped-call]
        flat, tuple(matrices), tuple(products), cast(there, x.dtype) if there else None, training, *factors
    )
    return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outs)


def plain_linears(
    x: Tensor, matrices: Sequence[Matrix], products: Sequence[Product | None], training: bool
) -> tuple[Tensor, ...]:
    """The plain twin, by autograd."""
    return tuple(_plain(x, m, p, training) for m, p in zip(matrices, products, strict=True))


def _plain(x: Tensor, matrix: Matrix, product: Product | None, training: bool) -> Tensor:
    y = torch.nn.functional.linear(x, matrix.out_in, matrix.bias)
    if product is None:
        return y
    dropped = torch.nn.functional.dropout(x, product.dropout, training)
    return y + dropped @ product.a.to(x.dtype).T @ product.b.to(x.dtype).T * product.scale


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        matrices: tuple[Matrix, ...],
        products: tuple[Product | None, ...],
        low_rank: Factors | None,
        training: bool,
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        outs = [m.forward(x) for m in matrices]
        there = [p for p in products if p is not None]
        lows, masks = lowered(x, there, low_rank, training) if low_rank else ([], [])
        changed = (i for i, p in enumerate(products) if p is not None)
        for i, p, low, b in zip(changed, there, lows, low_rank.b if low_rank else (), strict=True):
            outs[i].addmm_(low, b.T, alpha=p.scale)
        ctx.matrices, ctx.products, ctx.low_rank = matrices, products, low_rank
        ctx.save_for_backward(*((x, *lows, *masks) if there else ()))
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        there = [p for p in ctx.products if p is not None]
        dx, lows = None, []
        for m, p, slope in zip(ctx.matrices, ctx.products, slopes, strict=True):
            if ctx.needs_input_grad[0]:
                dx = m.backward(slope, dx)
            if p is not None:
                lows.append(slope)
        if not there:
            return dx, *([None] * 4)
        x, *saved = ctx.saved_tensors
        inner, masks = saved[: len(there)], saved[len(there) :]
        dx, grads = product_gradients(x, there, ctx.low_rank, lows, inner, masks, dx)
        return dx, *([None] * 4), *grads


def lowered(
    x: Tensor, products: Sequence[Product], low_rank: Factors, training: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """A x for each product, (n, rank) each, and the masks of dropout, where there is any."""
    ranks = [len(p.a) for p in products]
    if not (training and any(p.dropout for p in products)):
        return list(thin(x, low_rank.a).split_with_sizes(ranks, dim=1)), []
    dropped, masks = zip(*(torch.native_dropout(x, p.dropout, True) for p in products), strict=True)
    return [thin(d, a) for d, a in zip(dropped, low_rank.a.split_with_sizes(ranks), strict=True)], list(masks)


def product_gradients(
    x: Tensor,
    products: Sequence[Product],
    low_rank: Factors,
    slopes: Sequence[Tensor],
    inner: Sequence[Tensor],
    masks: Sequence[Tensor],
    dx: Tensor | None,
) -> tuple[Tensor | None, list[Tensor]]:
    """`dx` with the products' part added where it is wanted, and the gradient of each A and B in their own dtype.

    `inner`: A x of each product; `slopes`: the gradient of each linear's output.
    """
    db = [(slope.T @ low).mul_(p.scale) for slope, low, p in zip(slopes, inner, products, strict=True)]
    lows = [(slope @ b).mul_(p.scale) for slope, b, p in zip(slopes, low_rank.b, products, strict=True)]
    ranks = [len(p.a) for p in products]
    if masks:
        da = []
        for low, mask, a, p in zip(lows, masks, low_rank.a.split_with_sizes(ranks), products, strict=True):
            kept = mask / (1 - p.dropout)
            da.append(low.T @ (x * kept).to(x.dtype))
            if dx is not None:
                dx = dx + (low @ a) * kept
        dx = dx if dx is None else dx.to(x.dtype)
    else:
        stacked = lows[0] if len(lows) == 1 else torch.cat(lows, dim=1)
        da = list((stacked.T @ x).split_with_sizes(ranks))
        if dx is not None:
            dx = dx.addmm_(stacked, low_rank.a)
    return dx, [
        g.to(t.dtype) for p, *pair in zip(products, da, db, strict=True) for g, t in zip(pair, p[:2], strict=True)
    ]
