"""A sum that is not added up gives what the sum gives, in value and gradient, whatever is asked of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peftctl.kernels.sums import Sum

SCALE = 1.5
ENDS = torch.tensor([2, 2, 5, 7], dtype=torch.int32)  # an expert without a token among them
Ask = Callable[[Tensor, Tensor], Tensor]  # of an operand and the weight (4, 12, 8)

PRODUCTS: dict[str, tuple[tuple[int, ...], Ask]] = {
    "linear": ((5, 8), lambda x, w: F.linear(x, w[1])),
    "linear with a bias": ((5, 8), lambda x, w: F.linear(x, w[torch.tensor(2)], torch.ones(12))),
    "grouped": ((7, 8), lambda x, w: F.grouped_mm(x, w.transpose(-2, -1), offs=ENDS)),
    "grouped, as stored": ((7, 12), lambda x, w: F.grouped_mm(x, w, offs=ENDS)),
    "batched": ((3, 8), lambda x, w: torch.bmm(w[torch.tensor([3, 0, 3])], x.unsqueeze(-1)).squeeze(-1)),
    "before": ((4, 5, 12), lambda x, w: x @ w),
    "behind": ((4, 8, 5), lambda x, w: w.matmul(x)),
}
OTHERS: dict[str, tuple[tuple[int, ...], Ask]] = {
    "added": ((4, 12, 8), lambda x, w: w + x),
    "turned round": ((12, 4, 8), lambda x, w: w.transpose(0, 1) * x),
    "a row": ((8,), lambda x, w: w[:, 0] * x),
    "its square": ((4, 12, 12), lambda x, w: w @ w.transpose(1, 2) * x),
}


def factors(rank: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 12, 8), (4, 12, rank), (4, rank, 8))
    weight, left, right = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return weight, left.requires_grad_(), right.requires_grad_()


def answer(ask: Ask, shape: tuple[int, ...], whole: bool, dtype: torch.dtype) -> list[Tensor]:
    """What comes out, and the gradients of operand and factors."""
    weight, left, right = factors(dtype=dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()
    own = weight + left @ right * SCALE if whole else Sum(weight, left, right, SCALE)
    out = ask(x, own)
    assert type(out) is Tensor
    (out.float() * torch.arange(out.numel()).reshape(out.shape)).sum().backward()
    return [out.detach(), *(t.grad for t in (x, left, right) if t.grad is not None)]


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_those_of_the_sum_without_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, ask = PRODUCTS[name]
    expected = answer(ask, shape, True, torch.float32)  # the grouped product has no fp64
    monkeypatch.delattr(Sum, "plain")
    found = answer(ask, shape, False, torch.float32)
    assert len(found) == len(expected) == 4
    for own, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_else_is_asked_the_sum_itself_is_asked(name: str) -> None:
    shape, ask = OTHERS[name]
    for own, plain in zip(*(answer(ask, shape, whole, torch.float64) for whole in (False, True)), strict=True):
        torch.testing.assert_close(own, plain)


def test_it_says_of_itself_what_the_weight_says() -> None:
    weight, left, right = factors()
    own = Sum(weight.bfloat16(), left, right, SCALE)
    assert (own.shape, own.dtype, own.device, own.ndim) == (weight.shape, torch.bfloat16, weight.device, 3)
    assert own.size(0) == 4 and own.left.dtype is torch.bfloat16


def test_a_change_too_small_for_the_weights_digits_still_counts() -> None:
    weight, first = torch.ones(1, 16, 8, dtype=torch.bfloat16), torch.eye(8)[None, :1]
    own = Sum(weight, torch.full((1, 16, 1), 1e-3), first, 1.0)
    assert torch.equal(own.plain(), weight)  # rounded away
    x = torch.tensor([[1, -1, 0, 0, 0, 0, 0, 0]]).bfloat16()  # the weight alone gives 0
    torch.testing.assert_close(F.linear(x, own[0]).float(), torch.full((1, 16), 1e-3), rtol=1e-2, atol=0)


def test_the_start_is_the_weight_bit_for_bit() -> None:
    weight, left, right = factors(dtype=torch.float32)
    own = Sum(weight, torch.zeros_like(left), right, SCALE)
    x = torch.randn(7, 8)
    for ask in (PRODUCTS["linear"][1], PRODUCTS["grouped"][1]):
        assert torch.equal(ask(x, own), ask(x, weight))
