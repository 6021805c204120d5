"""A gated MLP, down(act(gate(x)) * up(x)), with the low-rank products of its linears, as one autograd function.

Only x and what gate and up gave are saved; what is made of them is made again in the backward pass, in few buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftctl.kernels.linear import Group, Product, plain_linears
from peftctl.kernels.matrix import Matrix

Activation = Callable[[Tensor], Tensor]
Slope = Callable[[Tensor, Tensor], Tensor]  # of the output's gradient and the input -> the input's gradient

_SLOPES: tuple[tuple[Activation, Slope], ...] = (
    (F.silu, torch.ops.aten.silu_backward.default),
    (F.gelu, torch.ops.aten.gelu_backward.default),
    (partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward.default, approximate="tanh")),
)


def slope_of(activation: Activation) -> Slope:
    """An activation's gradient: that of a usual one if it computes the same, else by autograd."""
    x = torch.linspace(-4, 4, 33)
    for usual, slope in _SLOPES:
        if torch.equal(activation(x), usual(x)):
            return slope

    def by_autograd(grad: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(activation(leaf), leaf, grad)
        return found

    return by_autograd


def gated(
    x: Tensor,
    matrices: Sequence[Matrix],
    products: Sequence[Product | None],
    activation: Activation,
    slope: Slope,
    training: bool,
) -> Tensor:
    """x (..., in) -> (..., out). `matrices` and `products` are those of gate, up and down, in that order.

    `slope`: the activation's, see `slope_of`.
    """
    first = Group(matrices[:2], products[:2], x.dtype, training)
    last = Group(matrices[2:], products[2:], x.dtype, training)
    flat = x.reshape(-1, x.shape[-1])
    factors = (*first.factors, *last.factors)
    out: Tensor = _Gated.apply(flat, first, last, activation, slope, *factors)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], -1)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Group, last: Group, activation: Activation, slope: Slope, *factors: Tensor
    ) -> Tensor:
        (gate, up), saved = first.forward(x)
        (out,), further = last.forward(activation(gate).mul_(up))
        ctx.groups, ctx.activation, ctx.slope, ctx.split = (first, last), activation, slope, len(saved)
        ctx.save_for_backward(x, gate, up, *saved, *further)
        return out

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, *saved = ctx.saved_tensors
        first, last = ctx.groups
        opened = ctx.activation(gate)
        inner, ends = last.backward(opened * up, slopes, saved[ctx.split :], True)
        up_slope = opened.mul_(inner)
        gate_slope = ctx.slope(inner.mul_(up), gate)
        dx, starts = first.backward(x, (gate_slope, up_slope), saved[: ctx.split], ctx.needs_input_grad[0])
        return dx, None, None, None, None, *starts, *ends


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
