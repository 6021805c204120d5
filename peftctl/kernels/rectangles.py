"""Where the queries and keys of a forest lie: lines of like length gathered into a few rectangles.

There is neither a (tokens x tokens) mask nor a call for each segment. A line is a segment's queries, or a part of them
where it is long; its keys are the tokens of its path, up to its own end where attention is causal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftctl.batch import Batch

QUERIES = 128  # longest line: causal keys end with it, so shorter lines waste less and cost more calls
OVERHEAD = 4096  # what a rectangle costs beside its area, in (query, key) pairs; measured with 9 heads
LARGEST = 1 << 20  # pairs in a rectangle of several lines; a bound on the memory of its scores
CUTS = 48  # places where the sorted lines may be cut; near-equal lengths lie side by side anyway
BEYOND = torch.iinfo(torch.long).max


class Line(NamedTuple):
    keys: Tensor  # token index of each key, in the order of the path
    first: int  # place of the first query on the path
    end: int  # and of the one after the last

    @property
    def size(self) -> tuple[int, int]:
        return self.end - self.first, len(self.keys)


class Rectangle(NamedTuple):
    """Some lines' queries and keys by token index, padded to one length each."""

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
class Laid:
    """Rectangles, and what layers have in common, made once and kept."""

    causal: bool
    rectangles: tuple[Rectangle, ...]
    inverse: Tensor  # (T,) place of each token among all rectangles' queries
    _masks: dict[tuple[int | None, int], list[Tensor]] = field(default_factory=dict)
    _biases: dict[tuple[int | None, int, torch.dtype], list[Tensor]] = field(default_factory=dict)
    _rows: dict[tuple[int, int, int], Rows] = field(default_factory=dict)

    def visible(self, window: int | None, virtual: int) -> list[Tensor]:
        """Per rectangle, (G, 1, Q, virtual + K), true where a query sees a key."""
        if (window, virtual) not in self._masks:
            self._masks[window, virtual] = [_visible(r, self.causal, window, virtual) for r in self.rectangles]
        return self._masks[window, virtual]

    def biases(self, window: int | None, virtual: int, dtype: torch.dtype) -> list[Tensor]:
        """Per rectangle, (G, 1, 1, Q, virtual + K), 0 where a query sees a key, else -inf: faster added than filled."""
        if (window, virtual, dtype) not in self._biases:
            self._biases[window, virtual, dtype] = [
                torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)[:, None]
                for mask in self.visible(window, virtual)
            ]
        return self._biases[window, virtual, dtype]

    def rows(self, heads: int, kv_heads: int, virtual: int) -> Rows:
        if (heads, kv_heads, virtual) not in self._rows:
            self._rows[heads, kv_heads, virtual] = _rows(self, heads, kv_heads, virtual)
        return self._rows[heads, kv_heads, virtual]


class Plan:
    """Where every query and key of a batch lies, on the batch's device."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.tokens = len(batch)
        self.kept: dict[tuple[object, ...], Any] = {}  # what a kernel of another kind makes of the plan
        self._laid: dict[bool, Laid] = {}

    def laid(self, causal: bool) -> Laid:
        if causal not in self._laid:
            self._laid[causal] = self._lay(causal)
        return self._laid[causal]

    def _lay(self, causal: bool) -> Laid:
        lines = [line for s in range(len(self.batch.parent)) for line in _lines(self.batch, s, causal)]
        rectangles = [_rectangle([lines[i] for i in group]) for group in _groups([line.size for line in lines])]
        places = torch.cat([r.queries.flatten() for r in rectangles])
        real = torch.cat([(r.query_positions >= 0).flatten() for r in rectangles])
        device = self.batch.ids.device
        moved = tuple(Rectangle(*(t.to(device) for t in r)) for r in rectangles)
        return Laid(causal, moved, _inverse(places, real, self.tokens).to(device))

    @cached_property
    def above(self) -> Tensor:
        """(S, S) whether the second segment is the first or one of its ancestors."""
        above = torch.eye(len(self.batch.parent), dtype=torch.bool)
        for segment, parent in enumerate(self.batch.parent.tolist()):  # parents come before their children
            if parent >= 0:
                above[segment] |= above[parent]
        return above.to(self.batch.ids.device)


def _lines(batch: Batch, segment: int, causal: bool) -> list[Line]:
    tokens = _path_tokens(batch, segment)
    start, end = batch.spans[segment]
    before = len(tokens) - (end - start)
    cuts = [*range(before, len(tokens), QUERIES), len(tokens)]
    return [Line(tokens[:b] if causal else tokens, a, b) for a, b in pairwise(cuts)]


def _path_tokens(batch: Batch, segment: int) -> Tensor:
    """Token indices of a segment's ancestors and itself, from the root."""
    parts, parents = [], batch.parent.tolist()
    while segment >= 0:
        parts.append(torch.arange(*batch.spans[segment]))
        segment = parents[segment]
    return torch.cat(parts[::-1])


def _groups(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The lines, sorted by length and cut into runs so that padded areas and overheads sum to the least."""
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i][1], sizes[i][0]))
    ends = [*range(0, len(order), max(1, -(-len(order) // CUTS))), len(order)]
    best: list[tuple[float, int]] = [(0.0, 0)]  # per cut: the cost of all before it, and the cut before it
    for b in range(1, len(ends)):
        width, depth, found = 0, 0, (float("inf"), 0)
        for a in range(b - 1, -1, -1):
            run = order[ends[a] : ends[a + 1]]
            width = max(width, *(sizes[i][0] for i in run))
            depth = max(depth, *(sizes[i][1] for i in run))
            area = (ends[b] - ends[a]) * width * depth
            if area > LARGEST and a < b - 1:
                break
            found = min(found, (best[a][0] + area + OVERHEAD, a))
        best.append(found)
    groups, b = [], len(ends) - 1
    while b:
        a = best[b][1]
        groups.append(order[ends[a] : ends[b]])
        b = a
    return groups[::-1]


def _rectangle(lines: Sequence[Line]) -> Rectangle:
    width, depth = (max(column) for column in zip(*(line.size for line in lines), strict=True))
    queries = torch.zeros(len(lines), width, dtype=torch.long)
    keys = torch.zeros(len(lines), depth, dtype=torch.long)
    query_positions = torch.full((len(lines), width), -1)
    key_positions = torch.full((len(lines), depth), BEYOND)
    for g, line in enumerate(lines):
        q, k = line.size
        queries[g, :q] = line.keys[line.first : line.end]
        keys[g, :k] = line.keys
        query_positions[g, :q] = torch.arange(line.first, line.end)
        key_positions[g, :k] = torch.arange(k)
    return Rectangle(queries, keys, query_positions, key_positions)


def _inverse(places: Tensor, real: Tensor, size: int) -> Tensor:
    inverse = torch.empty(size, dtype=torch.long, device=places.device)
    inverse[places[real]] = torch.arange(len(places), device=places.device)[real]
    return inverse


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


def _rows(laid: Laid, heads: int, kv_heads: int, virtual: int) -> Rows:
    device, tokens = laid.inverse.device, len(laid.inverse)
    groups, head = torch.arange(kv_heads, device=device), torch.arange(heads, device=device).view(kv_heads, -1)
    queries, keys, real, real_queries, real_keys = [], [], [], [], []
    for r in laid.rectangles:
        queries.append((r.queries[:, None, None, :] * heads + head[:, :, None]).flatten())
        padded = r.query_positions < 0
        real.append((~padded)[:, None, :, None] if padded.any() else None)
        real_queries.append((~padded)[:, None, None, :].expand(-1, *head.shape, -1).flatten())
        before = torch.arange(virtual, device=device).expand(len(r.keys), -1)
        path = torch.cat([before, r.keys + virtual], dim=1)
        keys.append((path[:, None, :] * kv_heads + groups[:, None]).flatten())
        there = torch.cat([before >= 0, r.key_positions < BEYOND], dim=1)
        real_keys.append(there[:, None, :].expand(-1, kv_heads, -1).flatten())
    inverse = _inverse(torch.cat(queries), torch.cat(real_queries), tokens * heads)
    places = torch.cat(real_keys).nonzero().flatten()
    rows = torch.cat(keys)[places]
    counts = torch.bincount(rows, minlength=(virtual + tokens) * kv_heads)
    order = places[torch.argsort(rows, stable=True)]
    return Rows(tuple(queries), tuple(keys), tuple(real), inverse, order, counts.cumsum(0) - counts)
