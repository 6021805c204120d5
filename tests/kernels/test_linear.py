"""Linears that share their input, with low-rank products, against autograd on the plain formula."""

import pytest
import torch
from torch import Tensor

from peftctl.kernels.linear import Product, linears, plain_linears
from peftctl.kernels.matrix import Matrix, Packed, linear, matrix, packable

OUT = (12, 4, 8)
KINDS = [
    (torch.float64, False, 1e-12),
    (torch.float32, True, 1e-5),
    (torch.float32, False, 1e-5),
    (torch.bfloat16, True, 2e-2),
    (torch.bfloat16, False, 2e-2),
]


def problem(
    dtype: torch.dtype, pack: bool, which: str, dropout: float = 0.0
) -> tuple[Tensor, list[Matrix], list[Product | None]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = random(2, 5, 16).to(dtype).requires_grad_()
    matrices = [matrix(random(n, 16).to(dtype), random(n).to(dtype) if n == 4 else None, pack=pack) for n in OUT]
    wide = torch.float32 if dtype is torch.bfloat16 else dtype  # adapters stay in fp32 over a bf16 base
    products: list[Product | None] = [
        Product(random(3, 16).to(wide).requires_grad_(), random(n, 3).to(wide).requires_grad_(), 0.5, dropout)
        for n in OUT
    ]
    return x, matrices, [p if mark == "p" else None for p, mark in zip(products, which, strict=True)]


def gradients(outs: tuple[Tensor, ...], x: Tensor, products: list[Product | None]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    loss = sum((o.double() * torch.randn(o.shape, generator=generator, dtype=torch.float64)).sum() for o in outs)
    return list(torch.autograd.grad(loss, [x, *(t for p in products if p is not None for t in p[:2])]))  # type: ignore[arg-type]


@pytest.mark.parametrize("which", ["ppp", "p..", ".pp", "..."])
@pytest.mark.parametrize(("dtype", "pack", "near"), KINDS)
def test_equals_the_plain_twin(dtype: torch.dtype, pack: bool, near: float, which: str) -> None:
    x, matrices, products = problem(dtype, pack, which)
    ours, theirs = linears(x, matrices, products, True), plain_linears(x, matrices, products, True)
    for a, b in [
        *zip(ours, theirs, strict=True),
        *zip(gradients(ours, x, products), gradients(theirs, x, products), strict=True),
    ]:
        assert a.dtype is b.dtype and a.shape == b.shape
        assert float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm()) < near


def test_gradients_by_finite_differences() -> None:
    x, matrices, products = problem(torch.float64, False, "p.p")
    factors = [t for p in products if p is not None for t in p[:2]]

    def function(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        one, two = Product(*factors[:2], 0.5), Product(*factors[2:], 0.5)
        return linears(x, matrices, [one, None, two], True)

    assert torch.autograd.gradcheck(function, (x, *factors))


def test_dropout_drops_its_share_and_its_gradient_is_that_of_what_was_kept() -> None:
    x, matrices, products = problem(torch.float64, False, "pp.", dropout=0.5)
    base = linears(x, matrices, [None] * 3, True)[0]
    torch.manual_seed(3)
    out = linears(x, matrices, products, True)[0] - base
    (dx,) = torch.autograd.grad(out[0, 0].sum(), x, retain_graph=True)
    product = products[0]
    assert product is not None
    # the change is linear in what was kept: it equals its own gradient times x
    torch.testing.assert_close((dx * x).sum(), out[0, 0].sum())
    kept = (dx[0, 0] != 0).double().mean()
    assert 0.2 < kept < 0.8
    slopes = torch.autograd.grad(out.sum(), product.a)[0]
    torch.testing.assert_close((slopes * product.a).sum(), out.sum())
    undropped = [p and p._replace(dropout=0.0) for p in products]
    assert torch.equal(linears(x, matrices, products, False)[0], linears(x, matrices, undropped, True)[0])


def test_below_the_first_product_no_gradient_is_taken() -> None:
    x, matrices, products = problem(torch.float64, False, "p..")
    matrices[0].backward = None  # type: ignore[method-assign,assignment]  # would fail if it were asked
    out = linears(x.detach(), matrices, products, True)[0]
    out.sum().backward()
    assert products[0] is not None and products[0].a.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_of_every_form_multiply_alike(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 10, dtype=dtype), torch.randn(6, dtype=dtype)
    x, slope = torch.randn(7, 10, dtype=dtype), torch.randn(7, 6, dtype=dtype)
    expected, back = x @ weight.T + bias, slope @ weight
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    stored = weight.T.contiguous()
    for pack in (False, True):
        for own in (matrix(weight, bias, pack=pack), matrix(stored, bias, transposed=True, pack=pack)):
            assert isinstance(own, Packed) is (pack and packable(weight))
            torch.testing.assert_close(own.forward(x), expected, **near)
            torch.testing.assert_close(own.backward(slope), back, **near)
            onto = torch.randn(7, 10, dtype=dtype)
            torch.testing.assert_close(own.backward(slope, onto.clone()), back + onto, **near)
            wide = slope[:, :1].expand(-1, 6)  # as the gradient of a sum is
            torch.testing.assert_close(own.backward(wide), wide @ weight, **near)
    torch.testing.assert_close(linear(x[:, ::2], weight[:, ::2]), x[:, ::2] @ weight[:, ::2].T, **near)


def test_what_torch_says_of_the_processor_is_packed() -> None:
    there = torch.backends.mkldnn.is_available()
    in_bf16 = there and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for dtype, can in ((torch.float32, there), (torch.bfloat16, in_bf16), (torch.float64, False)):
        assert packable(torch.zeros(4, 4, dtype=dtype)) is can
        assert not packable(torch.zeros(4, 4, dtype=dtype, device="meta"))


def test_no_copy_of_a_matrix_is_kept_unless_it_is_asked_for() -> None:
    weight = torch.randn(6, 10)
    kept = [value for value in vars(matrix(weight)).values() if isinstance(value, torch.Tensor)]
    assert [value.data_ptr() for value in kept] == [weight.data_ptr()]
