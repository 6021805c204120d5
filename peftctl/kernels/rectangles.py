"""Where the queries and keys of a forest lie: segments of like length gathered into a few rectangles.

There is neither a (tokens x tokens) mask nor a call for each segment: the queries of one are a line of a rectangle, its
keys are its ancestors' tokens and its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftctl.batch import Batch

GROUPS = 3  # rectangles a micro-batch; more cost calls, fewer cost padding
BEYOND = torch.iinfo(torch.long).max


class Rectangle(NamedTuple):
    """Some segments' queries and keys by token index, padded to one length each."""

    queries: Tensor  # (G, Q) token index
    keys: Tensor  # (G, K) token index
    query_positions: Tensor  # (G, Q) on the path; -1 where it is padding
    key_positions: Tensor  # (G, K), BEYOND where it is padding


class Rows(NamedTuple):
    """The same for the heads' vectors laid out as rows: token * heads + head, virtual tokens before the real ones."""

    queries: tuple[Tensor, ...]  # per rectangle (G * kv_heads * repeat * Q,)
    keys: tuple[Tensor, ...]  # per rectangle (G * kv_heads * (V + K),)
    real: tuple[Tensor | None, ...]  # per rectangle (G, 1, Q, 1), 0 for a padded query; None where none is
    inverse: Tensor  # (T * heads,) place of each query among all rectangles'
    order: Tensor  # places of the real keys among all rectangles', by key row
    offsets: Tensor  # ((V + T) * kv_heads,) where each key row's places begin in `order`


@dataclass
class Plan:
    """Where every query and key of a batch lies. What layers have in common is made once and kept."""

    rectangles: tuple[Rectangle, ...]
    inverse: Tensor  # (T,) place of each token among all rectangles' queries
    segment: Tensor  # (T,) segment of each token
    position: Tensor  # (T,) place of each token on its path
    above: Tensor  # (S, S) whether the second segment is the first or one of its ancestors
    masks: dict[tuple[bool, int | None, int], list[Tensor]] = field(default_factory=dict)
    biases: dict[tuple[object, ...], list[Tensor]] = field(default_factory=dict)
    all_rows: dict[tuple[int, int, int], Rows] = field(default_factory=dict)
    kept: dict[tuple[object, ...], Any] = field(default_factory=dict)  # what another kernel makes of the plan

    @property
    def tokens(self) -> int:
        return len(self.inverse)

    @property
    def longest(self) -> int:
        """The largest number of real keys a query may see."""
        return max(r.keys.shape[1] for r in self.rectangles)

    def visible(self, causal: bool, window: int | None, virtual: int) -> list[Tensor]:
        """Per rectangle, (G, 1, Q, virtual + K), true where a query sees a key."""
        if (causal, window, virtual) not in self.masks:
            self.masks[causal, window, virtual] = [_visible(r, causal, window, virtual) for r in self.rectangles]
        return self.masks[causal, window, virtual]

    def bias(
        self, causal: bool, window: int | None, virtual: int, heads: int, kv_heads: int, dtype: torch.dtype
    ) -> list[Tensor]:
        """Per rectangle, (G * kv_heads, repeat * Q, virtual + K): 0 where seen, else the lowest number."""
        key = (causal, window, virtual, heads, kv_heads, dtype)
        if key not in self.biases:
            self.biases[key] = [
                torch.zeros(mask.shape, dtype=dtype, device=mask.device)
                .masked_fill(~mask, torch.finfo(dtype).min)[:, :, None]
                .expand(-1, kv_heads, heads // kv_heads, -1, -1)
                .reshape(len(mask) * kv_heads, -1, mask.shape[-1])
                for mask in self.visible(causal, window, virtual)
            ]
        return self.biases[key]

    def rows(self, heads: int, kv_heads: int, virtual: int) -> Rows:
        if (heads, kv_heads, virtual) not in self.all_rows:
            self.all_rows[heads, kv_heads, virtual] = _rows(self, heads, kv_heads, virtual)
        return self.all_rows[heads, kv_heads, virtual]


def plan(batch: Batch) -> Plan:
    """The plan of a batch, on the batch's device."""
    tokens = [_path_tokens(batch, s) for s in range(len(batch.parent))]
    sizes = [(end - start, len(t)) for (start, end), t in zip(batch.spans, tokens, strict=True)]
    rectangles, order = [], []
    for group in _groups(sizes):
        rectangles.append(_rectangle(group, tokens, sizes))
        order.append(rectangles[-1].queries.flatten())
    real = torch.cat([(r.query_positions >= 0).flatten() for r in rectangles])
    inverse = _inverse(torch.cat(order), real, len(batch))
    device = batch.ids.device
    moved = tuple(Rectangle(*(t.to(device) for t in r)) for r in rectangles)
    return Plan(moved, inverse.to(device), batch.segment, batch.positions, _above(batch).to(device))


def _above(batch: Batch) -> Tensor:
    above = torch.eye(len(batch.parent), dtype=torch.bool)
    for segment, parent in enumerate(batch.parent.tolist()):  # parents come before their children
        if parent >= 0:
            above[segment] |= above[parent]
    return above


def _inverse(places: Tensor, real: Tensor, size: int) -> Tensor:
    inverse = torch.empty(size, dtype=torch.long, device=places.device)
    inverse[places[real]] = torch.arange(len(places), device=places.device)[real]
    return inverse


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


def _rectangle(group: list[int], tokens: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Rectangle:
    width, depth = max(sizes[s][0] for s in group), max(sizes[s][1] for s in group)
    queries = torch.zeros(len(group), width, dtype=torch.long)
    keys = torch.zeros(len(group), depth, dtype=torch.long)
    query_positions = torch.full((len(group), width), -1)
    key_positions = torch.full((len(group), depth), BEYOND)
    for g, s in enumerate(group):
        q, k = sizes[s]
        queries[g, :q] = tokens[s][k - q :]
        keys[g, :k] = tokens[s]
        query_positions[g, :q] = torch.arange(k - q, k)
        key_positions[g, :k] = torch.arange(k)
    return Rectangle(queries, keys, query_positions, key_positions)


def _visible(r: Rectangle, causal: bool, window: int | None, virtual: int) -> Tensor:
    query, key = r.query_positions[:, :, None], r.key_positions[:, None, :]
    seen = (key < BEYOND).expand(-1, query.shape[1], -1) & (query >= 0)
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


def _rows(plan: Plan, heads: int, kv_heads: int, virtual: int) -> Rows:
    device = plan.inverse.device
    groups, head = torch.arange(kv_heads, device=device), torch.arange(heads, device=device).view(kv_heads, -1)
    queries, keys, real, real_queries, real_keys = [], [], [], [], []
    for r in plan.rectangles:
        queries.append((r.queries[:, None, None, :] * heads + head[:, :, None]).flatten())
        padded = r.query_positions < 0
        real.append((~padded)[:, None, :, None] if padded.any() else None)
        real_queries.append((~padded)[:, None, None, :].expand(-1, *head.shape, -1).flatten())
        before = torch.arange(virtual, device=device).expand(len(r.keys), -1)
        tokens = torch.cat([before, r.keys + virtual], dim=1)
        keys.append((tokens[:, None, :] * kv_heads + groups[:, None]).flatten())
        there = torch.cat([before >= 0, r.key_positions < BEYOND], dim=1)
        real_keys.append(there[:, None, :].expand(-1, kv_heads, -1).flatten())
    inverse = _inverse(torch.cat(queries), torch.cat(real_queries), plan.tokens * heads)
    places = torch.cat(real_keys).nonzero().flatten()
    rows = torch.cat(keys)[places]
    counts = torch.bincount(rows, minlength=(virtual + plan.tokens) * kv_heads)
    order = places[torch.argsort(rows, stable=True)]
    return Rows(tuple(queries), tuple(keys), tuple(real), inverse, order, counts.cumsum(0) - counts)
