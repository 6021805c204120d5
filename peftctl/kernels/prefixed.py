"""Attention whose modules see trained keys and values before their own: for prefixes that no cache can hold.

An encoder has no cache, and a decoder's attention to it masks what it reads; so keys and values are put before the
module's own at each call. They take up no positions, and T5 adds no bias by distance to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from peftctl.errors import ModelError
from peftctl.kernels.attention import answering

NAME = "peftctl_prefixed"
Prefixes = Mapping[nn.Module, tuple[Tensor, Tensor]]  # of an attention: keys and values, (heads, tokens, width) each

_running: list[tuple[Prefixes, set[nn.Module]]] = []


@contextmanager
def running(model: nn.Module, prefixes: Prefixes) -> Iterator[None]:
    """Within it, these attentions see their prefixes. Raises ModelError for one that was not asked as it should be."""
    asked: set[nn.Module] = set()
    _running.append((prefixes, asked))
    try:
        with answering(model, NAME):
            yield
    finally:
        _running.pop()
    if set(prefixes) - asked:
        raise ModelError(
            f"{type(model).__name__} computes attention in a way of its own, so no prefix can be put there"
        )


def prefixed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """`query` (B, H, Q, D), `key` and `value` (B, H, K, D); mask and bias, both added, (B, H or 1, Q, K)."""
    prefixes, asked = _running[-1]
    added = [t for t in (attention_mask, position_bias) if t is not None]
    bias = sum(added[1:], added[0]) if added else None
    if module in prefixes:
        asked.add(module)
        before = (t.to(key.dtype).expand(len(key), -1, -1, -1) for t in prefixes[module])
        key, value = (torch.cat([own, real], dim=2) for own, real in zip(before, (key, value), strict=True))
        bias = functional.pad(bias, (key.shape[2] - bias.shape[3], 0)) if bias is not None else None
    out = functional.scaled_dot_product_attention(query, key, value, bias, dropout, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, prefixed_attention)
AttentionMaskInterface.register(NAME, eager_mask)  # additive, and causal where the module is
