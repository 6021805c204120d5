"""Attention over a forest: each segment sees itself and its ancestors, and the virtual tokens before them.

The function is registered with transformers' attention interface, so every architecture that dispatches through it is
served.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from peftctl.kernels import flex, forest
from peftctl.kernels.rectangles import Plan

NAME = "peftctl_forest"


@dataclass
class Running:
    """What the attention function must know while the trunk runs. `calls` counts how often it was asked."""

    plan: Plan
    keys: Sequence[Tensor] = ()  # virtual tokens, per layer (kv_heads, V, head_dim)
    values: Sequence[Tensor] = ()
    calls: int = 0


class Unsupported(Exception):
    """The architecture asks its attention for something that the forest cannot do."""


# A plain stack, not a context variable: on accelerators checkpoints are recomputed on a thread of their own.
_running: list[Running] = []


@contextmanager
def running(model: nn.Module, state: Running) -> Iterator[Running]:
    """Within it, the model's attention is the forest's; after it, what it was."""
    _running.append(state)
    try:
        with answering(model, NAME):
            yield state
    finally:
        _running.pop()


@contextmanager
def answering(model: nn.Module, name: str) -> Iterator[None]:
    """Within it, the model's attention is the function registered under a name."""
    configs: list[Any] = list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own


def checkpoint_contexts(model: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For gradient checkpointing: what a block's recomputation in the backward pass must run in."""
    return nullcontext(), running(model, _running[-1]) if _running else nullcontext()


def forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of the running batch. `query` (1, H, T, D), `key` and `value` (1, H_kv, T, D) -> (1, T, H, D)."""
    strange = [name for name in ("position_bias", "s_aux", "head_mask") if others.get(name) is not None]
    if attention_mask is not None or strange:
        raise Unsupported(f"{type(module).__name__} passes {', '.join(strange) or 'a mask'} to its attention")
    state = _running[-1]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    layer = getattr(module, "layer_idx", None)
    layer = state.calls if layer is None else layer
    state.calls += 1
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    virtual = state.keys[layer].shape[1] if state.keys else 0
    if virtual:
        before = (t[layer].transpose(0, 1).to(k.dtype) for t in (state.keys, state.values))
        k, v = (torch.cat([own, real]) for own, real in zip(before, (k, v), strict=True))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is None and not dropout and forest.applies(q, v):
        return forest.fused(q, k, v, state.plan, virtual, scale, causal, sliding_window)[None], None
    if flex.applies(q, dropout):
        return flex.flex(q, k, v, state.plan, virtual, scale, causal, sliding_window, softcap)[None], None
    return forest.plain(q, k, v, state.plan, virtual, scale, causal, sliding_window, dropout, softcap)[None], None


AttentionInterface.register(NAME, forest_attention)
