"""Root-mean-square norm with a frozen weight: the normalised input is all that is saved. https://arxiv.org/abs/1910.07467"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., d) -> weight * x / rms(x). The norm in fp32, the product with the weight in the input's dtype."""
    out: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = (wide * inverse).to(x.dtype)
        ctx.save_for_backward(normed, inverse, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        normed, inverse, weight = ctx.saved_tensors
        slope = grads[0] * weight
        along = (slope * normed).mean(-1, keepdim=True, dtype=inverse.dtype)
        # (slope - normed * along) * inverse, the small factors in fp32
        return (
            torch.addcmul(slope.to(inverse.dtype), normed, along, value=-1).mul_(inverse).to(normed.dtype),
            None,
            None,
        )


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The plain twin, as transformers computes it for the Llama family."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
