"""The norm with its own backward against autograd on the plain formula."""

import pytest
import torch

from peftctl.kernels.norm import plain_rms_norm, rms_norm


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_equals_the_plain_twin(dtype: torch.dtype, near: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, slope = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((2, 7, 16), (16,), (2, 7, 16))
    )
    found = []
    for function in (rms_norm, plain_rms_norm):
        leaf = x.clone().requires_grad_()
        out = function(leaf, weight, 1e-5)
        found.append((out.detach(), *torch.autograd.grad(out, leaf, slope)))
    for ours, theirs in zip(*found, strict=True):
        assert float((ours.double() - theirs.double()).norm() / theirs.double().norm()) < near


def test_gradients_by_finite_differences() -> None:
    x, weight = torch.randn(3, 5, dtype=torch.float64).requires_grad_(), torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: rms_norm(t, weight, 1e-6), (x,))
