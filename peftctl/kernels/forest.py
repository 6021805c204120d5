"""Attention over a forest's rectangles: explicit products with a backward of their own, and the plain twin.

On the CPU the products of short lines cost a fraction of a flash kernel's backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftctl.kernels.rectangles import Plan

KEPT = 320  # keys up to which the probabilities are kept for the backward pass; of longer lines they are made again


def applies(q: Tensor, v: Tensor) -> bool:
    """Whether the products are the faster way."""
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


def fused(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, virtual: int, scale: float, causal: bool, window: int | None
) -> Tensor:
    """q (T, H, D), k, v (virtual + T, H_kv, D) -> (T, H, D)."""
    out: Tensor = _Forest.apply(q, k, v, plan, virtual, scale, causal, window)  # type: ignore[no-untyped-call]
    return out


class _Forest(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: Plan,
        virtual: int,
        scale: float,
        causal: bool,
        window: int | None,
    ) -> Tensor:
        (_, heads, width), kv_heads = q.shape, k.shape[1]
        laid = plan.laid(causal)
        rows, biases = laid.rows(heads, kv_heads, virtual), laid.biases(window, virtual, q.dtype)
        flat_q, flat_k, flat_v = (t.reshape(-1, width) for t in (q, k, v))
        parts, kept = [], []
        for bias, query_rows, key_rows in zip(biases, rows.queries, rows.keys, strict=True):
            batch = len(bias) * kv_heads
            queries = flat_q.index_select(0, query_rows).view(batch, -1, width)
            keys, values = (t.index_select(0, key_rows).view(batch, -1, width) for t in (flat_k, flat_v))
            chances = _chances(queries, keys, bias, scale)
            parts.append((chances @ values).view(-1, width))
            if bias.shape[-1] <= KEPT:
                kept.append(chances)
        ctx.save_for_backward(flat_q, flat_k, flat_v, *kept)
        ctx.rows, ctx.biases, ctx.scale, ctx.shapes = rows, biases, scale, (q.shape, k.shape)
        return torch.cat(parts).index_select(0, rows.inverse).view(q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flat_q, flat_k, flat_v, *kept = ctx.saved_tensors
        (shape_q, shape_k), width, rows = ctx.shapes, flat_q.shape[1], ctx.rows
        grad, again = grads[0].reshape(-1, width), iter(kept)
        dqs, dks, dvs = [], [], []
        for bias, query_rows, key_rows, real in zip(ctx.biases, rows.queries, rows.keys, rows.real, strict=True):
            batch = len(bias) * shape_k[1]
            queries, out = (t.index_select(0, query_rows).view(batch, -1, width) for t in (flat_q, grad))
            keys, values = (t.index_select(0, key_rows).view(batch, -1, width) for t in (flat_k, flat_v))
            p = next(again) if bias.shape[-1] <= KEPT else _chances(queries, keys, bias, ctx.scale)
            if real is not None:  # what a padded query answers is nobody's
                out.view(len(real), -1, real.shape[2], width).mul_(real)
            slopes = torch._softmax_backward_data(out @ values.mT, p, -1, p.dtype)
            dqs.append((slopes @ keys).view(-1, width))
            dks.append((slopes.mT @ queries).view(-1, width))
            dvs.append((p.mT @ out).view(-1, width))
        dq = torch.cat(dqs).index_select(0, rows.inverse).mul_(ctx.scale)
        # each key's gradients from all the lines that see it, summed in fp32 and in one order
        dk, dv = (F.embedding_bag(rows.order, torch.cat(d), rows.offsets, mode="sum") for d in (dks, dvs))
        return dq.view(shape_q), dk.mul_(ctx.scale).view(shape_k), dv.view(shape_k), *([None] * 5)


def _chances(queries: Tensor, keys: Tensor, bias: Tensor, scale: float) -> Tensor:
    """The probabilities (G * H_kv, repeat * Q, K) of a rectangle whose bias is (G, 1, 1, Q, K)."""
    scores = torch.baddbmm(queries.new_zeros(()), queries, keys.mT, beta=0, alpha=scale)
    groups, *_, rows, depth = bias.shape
    scores.view(groups, keys.shape[0] // groups, -1, rows, depth).add_(bias)
    return torch.softmax(scores, dim=-1)


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    virtual: int,
    scale: float,
    causal: bool,
    window: int | None,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """The plain twin, by torch's own attention: also with dropout on the probabilities and a cap on the scores."""
    laid, front, parts = plan.laid(causal), torch.arange(virtual, device=q.device), []
    for r, mask in zip(laid.rectangles, laid.visible(window, virtual), strict=True):
        places = torch.cat([front.expand(len(r.keys), -1), r.keys + virtual], dim=1)
        parts.append(_attend(q[r.queries], k[places], v[places], mask, scale, dropout, softcap).flatten(0, 1))
    return torch.cat(parts)[laid.inverse]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, dropout: float, softcap: float | None
) -> Tensor:
    """q (G, Q, H, D), k, v (G, K, H_kv, D), mask (G, 1, Q, K) -> (G, Q, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    groups, kv_heads, repeat = len(q), k.shape[1], q.shape[1] // k.shape[1]
    shape, rows = q.shape, q.shape[2]
    if repeat > 1:  # the heads that share keys stand one under the other, so that the keys need no copies
        q, mask = q.reshape(groups, kv_heads, repeat * rows, -1), mask.repeat(1, 1, repeat, 1)
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    else:
        scores = torch.tanh(q @ k.mT * scale / softcap) * softcap
        scores = scores.masked_fill(~mask, torch.finfo(q.dtype).min)
        chances = F.dropout(scores.softmax(-1, dtype=torch.float32).to(q.dtype), dropout)
        out = chances @ v
    return out.reshape(*shape[:3], -1).transpose(1, 2)
