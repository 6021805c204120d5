"""Attention over a forest: each segment sees itself and its ancestors, and the virtual tokens before them.

The function is registered with transformers' attention interface, so every architecture that dispatches through it is
served. Segments of like length are computed together: their keys are gathered by index into a few rectangles, so there
is neither a (tokens x tokens) mask nor a call for each segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from peftctl.batch import Batch

NAME = "peftctl_forest"
GROUPS = 3  # rectangles a micro-batch; more cost calls, fewer cost padding


class Rectangle(NamedTuple):
    """Some segments' queries and keys by token index, padded to one length each."""

    queries: Tensor  # (G, Q) token index
    keys: Tensor  # (G, K) token index
    query_positions: Tensor  # (G, Q)
    key_positions: Tensor  # (G, K), beyond every query where it is padding


@dataclass
class Plan:
    """Where every query and key of a batch lies; `masks` are made once for each (causal, window, virtual)."""

    rectangles: tuple[Rectangle, ...]
    inverse: Tensor  # (T,) place of each token among all rectangles' queries
    masks: dict[tuple[bool, int | None, int], list[Tensor]] = field(default_factory=dict)

    def visible(self, causal: bool, window: int | None, virtual: int) -> list[Tensor]:
        """Per rectangle, (G, 1, Q, virtual + K), true where a query sees a key."""
        if (causal, window, virtual) not in self.masks:
            self.masks[causal, window, virtual] = [_visible(r, causal, window, virtual) for r in self.rectangles]
        return self.masks[causal, window, virtual]


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
    configs: list[Any] = list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())
    before = [config._attn_implementation for config in configs]
    _running.append(state)
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield state
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        _running.pop()


def checkpoint_contexts(model: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For gradient checkpointing: what a block's recomputation in the backward pass must run in."""
    return nullcontext(), running(model, _running[-1]) if _running else nullcontext()


def plan(batch: Batch) -> Plan:
    """The plan of a batch, on the batch's device."""
    tokens = [_path_tokens(batch, s) for s in range(len(batch.parent))]
    sizes = [(end - start, len(t)) for (start, end), t in zip(batch.spans, tokens, strict=True)]
    rectangles, order = [], []
    for group in _groups(sizes):
        rectangles.append(_rectangle(batch, group, tokens, sizes))
        order.append(rectangles[-1].queries.flatten())
    inverse = torch.empty(len(batch), dtype=torch.long)
    places, real = torch.cat(order), torch.cat([(r.query_positions >= 0).flatten() for r in rectangles])
    inverse[places[real]] = torch.arange(len(places))[real]
    device = batch.ids.device
    return Plan(tuple(Rectangle(*(t.to(device) for t in r)) for r in rectangles), inverse.to(device))


def _path_tokens(batch: Batch, segment: int) -> Tensor:
    """Token indices of a segment's ancestors and itself, from the root."""
    parts, parents = [], batch.parent.tolist()
    while segment >= 0:
        parts.append(torch.arange(*batch.spans[segment]))
        segment = parents[segment]
    return torch.cat(parts[::-1])


def _groups(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Split the segments, sorted by length, into at most GROUPS runs of least padded area."""
    order = sorted(range(len(sizes)), key=lambda s: (sizes[s][1], sizes[s][0]))

    def area(low: int, high: int) -> int:
        run = [sizes[s] for s in order[low:high]]
        return len(run) * max(q for q, _ in run) * max(k for _, k in run)

    n = len(order)
    step = max(1, n // 48)  # a bound on the search; near-equal lengths lie side by side anyway
    cuts = list(range(step, n, step))
    best = min(
        ((area(0, a) + area(a, b) + area(b, n), (0, a, b, n)) for i, a in enumerate(cuts) for b in cuts[i + 1 :]),
        default=(area(0, n), (0, n)),
    )
    if GROUPS < 3 or best[0] >= area(0, n):
        best = (area(0, n), (0, n))
    return [order[low:high] for low, high in zip(best[1], best[1][1:], strict=False)]


def _rectangle(batch: Batch, group: list[int], tokens: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Rectangle:
    width, depth = max(sizes[s][0] for s in group), max(sizes[s][1] for s in group)
    queries = torch.zeros(len(group), width, dtype=torch.long)
    keys = torch.zeros(len(group), depth, dtype=torch.long)
    query_positions = torch.full((len(group), width), -1)
    key_positions = torch.full((len(group), depth), torch.iinfo(torch.long).max)
    for g, s in enumerate(group):
        q, k = sizes[s]
        queries[g, :q] = tokens[s][k - q :]
        keys[g, :k] = tokens[s]
        query_positions[g, :q] = torch.arange(k - q, k)
        key_positions[g, :k] = torch.arange(k)
    return Rectangle(queries, keys, query_positions, key_positions)


def _visible(r: Rectangle, causal: bool, window: int | None, virtual: int) -> Tensor:
    query, key = r.query_positions[:, :, None], r.key_positions[:, None, :]
    real = key < torch.iinfo(torch.long).max
    seen = real.expand(-1, query.shape[1], -1) & (query >= 0)
    if causal:
        seen = seen & (key <= query)
    if window is not None:
        seen = seen & (key > query - window) & (causal | (key < query + window))
    # a padded query sees the first key, so that its softmax is defined; its result is never read
    first = torch.zeros_like(seen)
    first[:, :, 0] = True
    seen = seen | (first & (query < 0))
    if virtual:
        # they stand before the first token, and fall out of a sliding window as it moves on
        before = torch.arange(-virtual, 0, device=query.device)
        near = (before > query - window) if window is not None else (before == before)[None, None]
        seen = torch.cat([near.expand(len(seen), seen.shape[1], virtual), seen], dim=2)
    return seen[:, None]


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
    virtual = (state.keys[layer], state.values[layer]) if state.keys else None
    length = virtual[0].shape[1] if virtual is not None else 0
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    parts = []
    for r, mask in zip(state.plan.rectangles, state.plan.visible(causal, sliding_window, length), strict=True):
        gathered = (q[r.queries], k[r.keys], v[r.keys])
        out = _attend(*gathered, mask, virtual, scaling, dropout, softcap)  # (G, Q, H, D)
        parts.append(out.flatten(0, 1))
    return torch.cat(parts)[state.plan.inverse][None], None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    virtual: tuple[Tensor, Tensor] | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
) -> Tensor:
    """q (G, Q, H, D), k, v (G, K, H_kv, D), mask (G, 1, Q, V + K) -> (G, Q, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if virtual is not None:
        k, v = (
            torch.cat([t.to(x.dtype).expand(len(x), -1, -1, -1), x], dim=2)
            for t, x in zip(virtual, (k, v), strict=True)
        )
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling)
    else:
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~mask, torch.finfo(q.dtype).min)
        chances = F.dropout(scores.softmax(-1, dtype=torch.float32).to(q.dtype), dropout)
        out = chances @ v
    return out.transpose(1, 2)


AttentionInterface.register(NAME, forest_attention)
