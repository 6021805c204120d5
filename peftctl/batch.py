"""A micro-batch as a forest: its real tokens once each, no padding, what rows share at their start computed once.

A segment is a run of tokens; a row is a path of segments from a root. The first token of a child is predicted by its
parent's last position, so labels belong to rows, not to tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from peftctl.row import Row

Tell = Callable[[int, int], None]  # micro-batches done, and the real tokens in them


class Labels(NamedTuple):
    """One entry a label, each (labels,): where it is predicted from, what it is, whose it is, what it counts.

    What it is: a token, or for a task's head a label's index or a number.
    """

    source: Tensor
    target: Tensor
    row: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Batch:
    """Plain tensors on one device; no model in sight."""

    ids: Tensor  # (T,)
    positions: Tensor  # (T,) place of each token on its path
    segment: Tensor  # (T,)
    parent: Tensor  # (S,) -1 for a root
    labels: Labels
    paths: tuple[tuple[int, ...], ...]  # per row: its segments from the root
    roles: tuple[str, ...]
    examples: tuple[int, ...]
    rows: tuple[Row, ...]
    trimmed: bool = False  # whether what follows a row's last source is left out
    types: Tensor | None = None  # (T,) of pairs of texts

    def __len__(self) -> int:
        """Number of tokens that are computed."""
        return len(self.ids)

    @property
    def real_tokens(self) -> int:
        """Number of tokens in the rows, shared ones once for each row."""
        return sum(len(row.ids) for row in self.rows)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Start and end of each segment in the line of tokens."""
        counts = torch.bincount(self.segment, minlength=len(self.parent)).tolist()
        ends = torch.tensor(counts).cumsum(0).tolist()
        return [(end - count, end) for end, count in zip(ends, counts, strict=True)]

    @cached_property
    def row_tokens(self) -> list[Tensor]:
        """Per row, the indices of its tokens along its path; on the CPU."""
        return [torch.cat([torch.arange(*self.spans[s]) for s in path]) for path in self.paths]

    @cached_property
    def firsts(self) -> Tensor:
        """(labels,) index of the first token of each label's row."""
        starts = torch.tensor([self.spans[path[0]][0] for path in self.paths], device=self.ids.device)
        return starts[self.labels.row]

    @property
    def visited(self) -> int:
        """Number of computed tokens in the rows, shared ones once for each row."""
        ends = [end - start for start, end in self.spans]
        return sum(ends[segment] for path in self.paths for segment in path)

    @cached_property
    def counts(self) -> Tensor:
        """(T,) in how many rows each token is."""
        rows = torch.tensor([segment for path in self.paths for segment in path], dtype=torch.long)
        return torch.bincount(rows, minlength=len(self.parent)).to(self.ids.device)[self.segment]

    def role(self, name: str) -> Tensor:
        """Indices of the rows with that role, in order."""
        found = [i for i, role in enumerate(self.roles) if role == name]
        return torch.tensor(found, dtype=torch.long, device=self.ids.device)

    def to(self, device: torch.device | str) -> Batch:
        labels = Labels(*(t.to(device) for t in self.labels))
        named = ("ids", "positions", "segment", "parent", *(() if self.types is None else ("types",)))
        moved = {name: getattr(self, name).to(device) for name in named}
        return replace(self, labels=labels, **moved)

    def only(self, *roles: str) -> Batch:
        """The rows of these roles alone; what they share at their start is computed once if that was so before."""
        kept = [row for row in self.rows if row.role in roles]
        shared = any(len(path) > 1 for path in self.paths)
        return build(kept, share="all" if shared else "none", trim=self.trimmed).to(self.ids.device)

    def behind(self, length: int, share: str = "all") -> Batch:
        """The same rows and labels, each row behind so many placeholders (id 0) for tokens that have none."""
        before = (0,) * length

        def put(r: Row) -> Row:
            # a row's first token is predicted by nothing, and stays so
            weights = (*before, *r.weights) if r.targets else (*before, 0.0, *r.weights[1:])
            targets, types = before + r.targets if r.targets else (), before + r.types if r.types else ()
            return r._replace(ids=before + r.ids, weights=weights, targets=targets, types=types)

        rows = [put(row) for row in self.rows]
        return build(rows, share=share, trim=self.trimmed).to(self.ids.device)

    def unshared(self) -> Batch:
        """The same rows, each a tree of its own."""
        return build(self.rows, share="none").to(self.ids.device)


def build(rows: Sequence[Row], share: str = "all", trim: bool = False) -> Batch:
    """The forest of some rows. `share`: `all`, or `none` for one tree a row.

    `trim`: leave out the tokens that no label is predicted from or through, the last label itself among them. Only
    where attention is causal is nothing lost by it; the tokens of a row are then no longer all on its path.
    """
    whole, rows = rows, [_trimmed(row) for row in rows] if trim else rows
    segments: list[tuple[int, tuple[int, ...], int]] = []  # parent, ids, position of the first token
    paths: list[list[int]] = [[] for _ in rows]
    if share == "none":
        for index, row in enumerate(rows):
            _append(segments, paths, -1, row.ids, 0, [index])
    else:
        _grow(rows, list(range(len(rows))), 0, -1, segments, paths)
    starts = [0]
    for _, ids, _ in segments:
        starts.append(starts[-1] + len(ids))
    tokens = [[starts[s] + k for s in p for k in range(len(segments[s][1]))] for p in paths]
    return Batch(
        ids=torch.tensor([i for _, ids, _ in segments for i in ids], dtype=torch.long),
        positions=torch.tensor([p + k for _, ids, p in segments for k in range(len(ids))], dtype=torch.long),
        segment=torch.tensor([s for s, (_, ids, _) in enumerate(segments) for _ in ids], dtype=torch.long),
        parent=torch.tensor([parent for parent, _, _ in segments], dtype=torch.long),
        labels=_labels(whole, tokens),
        paths=tuple(map(tuple, paths)),
        roles=tuple(row.role for row in whole),
        examples=tuple(row.example for row in whole),
        rows=tuple(whole),
        trimmed=trim,
        types=_types(rows, tokens, starts[-1]),
    )


def _trimmed(row: Row) -> Row:
    last = next((k for k in range(len(row.ids) - 1, 0, -1) if row.weights[k]), 1)
    return row.part(0, last + bool(row.targets))


def _grow(
    rows: Sequence[Row],
    members: list[int],
    start: int,
    parent: int,
    segments: list[tuple[int, tuple[int, ...], int]],
    paths: list[list[int]],
) -> None:
    """Split the members by their next token; each part's common run becomes a segment, then its children grow."""
    groups: dict[int, list[int]] = {}
    for member in members:
        if start < len(rows[member].ids):
            groups.setdefault(rows[member].ids[start], []).append(member)
    for group in groups.values():
        end = _common(rows, group, start)
        index = _append(segments, paths, parent, rows[group[0]].ids[start:end], start, group)
        if len(group) > 1:
            _grow(rows, group, end, index, segments, paths)


def _common(rows: Sequence[Row], group: list[int], start: int) -> int:
    """Where the rows of a group first differ, or the shortest ends."""
    first, shortest = rows[group[0]].ids, min(len(rows[m].ids) for m in group)
    end = start + 1
    while end < shortest and all(rows[m].ids[end] == first[end] for m in group):
        end += 1
    return end if len(group) > 1 else len(first)


def _append(
    segments: list[tuple[int, tuple[int, ...], int]],
    paths: list[list[int]],
    parent: int,
    ids: tuple[int, ...],
    position: int,
    members: list[int],
) -> int:
    segments.append((parent, ids, position))
    for member in members:
        paths[member].append(len(segments) - 1)
    return len(segments) - 1


def _labels(rows: Sequence[Row], tokens: list[list[int]]) -> Labels:
    entries = [entry for r, row in enumerate(rows) for entry in _of(row, r, tokens[r])]
    source, target, owner, weight = zip(*entries, strict=True) if entries else ((), (), (), ())
    exact = torch.float32 if any(isinstance(value, float) for value in target) else torch.long
    places = [torch.tensor(column, dtype=torch.long) for column in (source, owner)]
    values = [torch.tensor(target, dtype=exact), torch.tensor(weight, dtype=torch.float32)]
    return Labels(places[0], values[0], places[1], values[1])


def _of(row: Row, number: int, tokens: list[int]) -> Iterator[tuple[int, float, int, float]]:
    """Source, target, row and weight of each label of a row."""
    if row.targets:
        places = (k for k, weight in enumerate(row.weights) if weight)
        yield from ((tokens[k], row.targets[k], number, row.weights[k]) for k in places)
    else:
        places = (k for k in range(1, len(row.ids)) if row.weights[k])
        yield from ((tokens[k - 1], row.ids[k], number, row.weights[k]) for k in places)


def _types(rows: Sequence[Row], tokens: list[list[int]], total: int) -> Tensor | None:
    if not any(row.types for row in rows):
        return None
    types = [0] * total
    for row, places in zip(rows, tokens, strict=True):
        for place, kind in zip(places, row.types, strict=False):  # none of a row without types
            types[place] = kind
    return torch.tensor(types, dtype=torch.long)


def counted(batches: Iterable[Batch], tell: Tell) -> Iterator[Batch]:
    """The same batches; what is done of them is told whenever the next one is asked for."""
    tokens = 0
    tell(0, 0)
    for done, batch in enumerate(batches, 1):
        yield batch
        tokens += batch.real_tokens
        tell(done, tokens)
