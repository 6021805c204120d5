"""A gated MLP in one function against autograd on the plain formula."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peftctl.kernels.linear import Product
from peftctl.kernels.matrix import Matrix, matrix
from peftctl.kernels.mlp import Activation, gated, plain_gated, slope_of

SHAPES = ((12, 8), (12, 8), (8, 12))


def problem(dtype: torch.dtype, which: str, pack: bool) -> tuple[Tensor, list[Matrix], list[Product | None]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.float32 if dtype is torch.bfloat16 else dtype
    matrices = [matrix((random(*s) / 3).to(dtype), pack=pack) for s in SHAPES]
    products = [
        Product(random(2, s[1]).to(wide).requires_grad_(), random(s[0], 2).to(wide).requires_grad_(), 0.5)
        if mark == "p"
        else None
        for s, mark in zip(SHAPES, which, strict=True)
    ]
    return random(3, 4, 8).to(dtype).requires_grad_(), matrices, products


@pytest.mark.parametrize("which", ["ppp", "..p", "pp.", "..."])
@pytest.mark.parametrize("activation", [F.silu, F.gelu, partial(F.gelu, approximate="tanh"), torch.relu])
@pytest.mark.parametrize(
    ("dtype", "pack", "near"),
    [(torch.float64, False, 1e-12), (torch.float32, True, 1e-5), (torch.bfloat16, False, 3e-2)],
)
def test_equals_the_plain_twin(dtype: torch.dtype, pack: bool, near: float, activation: Activation, which: str) -> None:
    found = []
    for function in (gated, plain_gated):
        x, matrices, products = problem(dtype, which, pack)
        extra = (slope_of(activation),) if function is gated else ()
        out = function(x, matrices, products, activation, *extra, True)  # type: ignore[operator]
        wanted = [x, *(t for p in products if p is not None for t in p[:2])]
        slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        found.append([out.detach(), *torch.autograd.grad(out, wanted, slope)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype is theirs.dtype
        assert float((ours.double() - theirs.double()).norm() / theirs.double().norm()) < near


def test_gradients_by_finite_differences() -> None:
    x, matrices, products = problem(torch.float64, "p.p", False)

    def function(x: Tensor, *factors: Tensor) -> Tensor:
        one, two = Product(*factors[:2], 0.5), Product(*factors[2:], 0.5)
        return gated(x, matrices, [one, None, two], F.silu, slope_of(F.silu), True)

    assert torch.autograd.gradcheck(function, (x, *(t for p in products if p is not None for t in p[:2])))


def test_without_a_gradient_for_the_input_the_factors_still_get_theirs() -> None:
    x, matrices, products = problem(torch.float64, "ppp", False)
    gated(x.detach(), matrices, products, F.silu, slope_of(F.silu), True).sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for p in products if p is not None for t in p[:2])
