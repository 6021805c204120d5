"""Attention over a forest by torch's flex attention: one kernel for the whole line of tokens, for CUDA devices.

https://pytorch.org/docs/stable/nn.attention.flex_attention.html
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from peftctl.kernels.rectangles import Plan


def applies(q: Tensor, dropout: float) -> bool:
    """Whether the kernel is there for these tensors: compiled, on CUDA, for widths that are powers of two."""
    width = q.shape[-1]
    return q.is_cuda and not dropout and width >= 16 and width & (width - 1) == 0 and _there_is_one()


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    virtual: int,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None = None,
    *,
    compiled: bool = True,
) -> Tensor:
    """q (T, H, D), k, v (virtual + T, H_kv, D) -> (T, H, D). Not compiled, it is what tests can run on any device."""
    key = ("flex", virtual, causal, window)
    if key not in plan.kept:
        plan.kept[key] = _mask(plan, virtual, causal, window)

    cap = softcap or 1.0

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, at: Tensor) -> Tensor:
        return torch.tanh(score / cap) * cap

    attend = _compiled() if compiled else _plain()
    out: Tensor = attend(
        *(t.transpose(0, 1)[None] for t in (q, k, v)),
        score_mod=capped if softcap is not None else None,
        block_mask=plan.kept[key],
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def _mask(plan: Plan, virtual: int, causal: bool, window: int | None) -> Any:
    """Which token sees which: those on its path, virtual tokens before them, within the window."""
    from torch.nn.attention.flex_attention import create_block_mask

    segment, position, above = plan.batch.segment, plan.batch.positions, plan.above

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at = (key - virtual).clamp(min=0)
        place, own = torch.where(key < virtual, key - virtual, position[at]), position[query]
        seen = above[segment[query], segment[at]] | (key < virtual)
        if causal:
            seen = seen & (place <= own)
        if window is not None:
            seen = seen & (place > own - window) & (causal | (place < own + window))
        return seen

    device = str(position.device)
    return create_block_mask(sees, None, None, plan.tokens, virtual + plan.tokens, device=device)


def _plain() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@cache
def _compiled() -> Any:
    return torch.compile(_plain(), dynamic=True)


@cache
def _there_is_one() -> bool:
    """Whether a small case compiles and runs here: what it needs (Triton, a recent card) is not asked for by name."""
    try:
        q = torch.randn(1, 1, 128, 16, device="cuda", requires_grad=True)
        _compiled()(q, q, q).sum().backward()
    except Exception:  # whatever it is, torch's own attention serves
        return False
    return True
