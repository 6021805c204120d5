"""A gated MLP, down(act(gate(x)) * up(x)), with the low-rank products of its linears, as one autograd function.

Only x and what gate and up gave are saved; what is made of them is made again in the backward pass, in few buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peftctl.kernels.linear import Group, Product, plain_linears
from peftctl.kernels.matrix import Matrix

Activation = Callable[[Tensor], Tensor]


def gated(
    x: Tensor,
    matrices: Sequence[Matrix],
    products: Sequence[Product | None],
    activation: Activation,
    training: bool,
) -> Tensor:
    """x (..., in) -> (..., out). `matrices` and `products` are those of gate, up and down, in that order."""
    first = Group(matrices[:2], products[:2], x.dtype, training)
    last = Group(matrices[2:], products[2:], x.dtype, training)
    flat = x.reshape(-1, x.shape[-1])
    factors = (*first.factors, *last.factors)
    out: Tensor = _Gated.apply(flat, first, last, activation, *factors)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], -1)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Group, last: Group, activation: Activation, *factors: Tensor) -> Tensor:
        (gate, up), saved = first.forward(x)
        (out,), further = last.forward(activation(gate).mul_(up))
        ctx.first, ctx.last, ctx.activation, ctx.split = first, last, activation, len(saved)
        ctx.save_for_backward(x, gate, up, *saved, *further)
        return out

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, *saved = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            active = ctx.activation(leaf)
        opened = active.detach()
        inner, last = ctx.last.backward(opened * up, slopes, saved[ctx.split :], True)
        up_slope = inner * opened
        (gate_slope,) = torch.autograd.grad(active, leaf, inner.mul_(up))
        wanted = ctx.needs_input_grad[0]
        dx, first = ctx.first.backward(x, (gate_slope, up_slope), saved[: ctx.split], wanted)
        return dx, None, None, None, *first, *last


def plain_gated(
    x: Tensor,
    matrices: Sequence[Matrix],
    products: Sequence[Product | None],
    activation: Activation,
    training: bool,
) -> Tensor:
    """The plain twin, by autograd."""
    gate, up = plain_linears(x, matrices[:2], products[:2], training)
    return plain_linears(activation(gate) * up, matrices[2:], products[2:], training)[0]
