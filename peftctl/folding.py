"""What a merge changes: the deltas by the parameters that they fold into, and a tensor of a file with them inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite, prod
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from peftctl.errors import FormatError, Unfoldable
from peftctl.formats.shards import WIDTHS, Entry, Shard
from peftctl.methods.attachment import Attachment, Delta
from peftctl.skeleton import dotted

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCK = (
    1 << 18
)  # numbers of a tensor that are read at once: few enough to stay in a cache, and in memory that is reused


class Fold(NamedTuple):
    """One change of one parameter; `name` is the parameter's own, without the module's path."""

    name: str
    delta: Delta


Folds = dict[str, list[Fold]]  # full name -> the changes, in the order of their application


def folds_of(attachment: Attachment, model: nn.Module) -> Folds:
    """Every delta under the parameters that it changes. Raises Unfoldable for one that no weight can hold."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    mirrored = {dotted(path, name) for path, delta in attachment.named_deltas() for name in delta.mirrors()}
    found: Folds = {}
    for path, delta in attachment.named_deltas():
        if delta.inert:
            continue
        if not delta.folds():
            delta.fold("weight", torch.zeros(0))  # says why it cannot
            raise Unfoldable(f"{path or type(delta).__name__}: no plain weight can hold this change")
        for name in delta.folds():
            full = dotted(path, name)
            if full not in parameters:
                delta.fold(name, torch.zeros(0))
                raise Unfoldable(f"{full}: the base has no such parameter, so the change has nowhere to go")
            _alone(full, parameters, mirrored)
            found.setdefault(full, []).append(Fold(name, delta))
    return found


def folded_shape(shape: tuple[int, ...], folds: Sequence[Fold]) -> tuple[int, ...]:
    """What a stored parameter's shape becomes: a vocabulary may have grown."""
    for name, delta in folds:
        shape = delta.shape(name, shape)
    return shape


def _alone(full: str, parameters: Mapping[str, nn.Parameter], mirrored: set[str]) -> None:
    """Refuse a change of a tied parameter that is not made at all its places."""
    others = [name for name, p in parameters.items() if p is parameters[full] and name != full]
    if len({full, *others} - mirrored) > 1:
        raise Unfoldable(
            f"{full} is tied to {', '.join(others)}, so folding would change both: "
            "leave it out of the targets, or serve the adapter unmerged"
        )


def stored(source: BinaryIO, shard: Shard, entry: Entry) -> Tensor:
    """A floating-point tensor of an open file, as it is stored."""
    source.seek(shard.data + entry.start)
    data = bytearray(entry.end - entry.start)
    if source.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise FormatError(f"{entry.name}: its file ended early; it changed while it was read")
    return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(entry.shape)


def rows_of(entry: Entry, first: int, last: int) -> Entry:
    """Some rows of a stored tensor, as an entry of their own."""
    row = WIDTHS[entry.dtype] * prod(entry.shape[1:])
    start, end = entry.start + first * row, entry.start + last * row
    return entry._replace(shape=(last - first, *entry.shape[1:]), start=start, end=end)


def blocks(entry: Entry, size: int = BLOCK) -> Iterator[tuple[int, Entry]]:
    """A stored tensor in blocks of at most `size` numbers, or of one row: each block's first row, and its entry."""
    if not entry.shape:
        yield 0, entry
        return
    step = max(1, size // max(1, prod(entry.shape[1:])))
    for first in range(0, entry.shape[0], step):
        yield first, rows_of(entry, first, min(first + step, entry.shape[0]))


class Summed(Delta):
    """What several adapters add to one parameter, each to the base's own value."""

    def __init__(self, changes: Sequence[Sequence[Fold]]) -> None:
        super().__init__()
        self.changes = changes

    def fold(self, name: str, weight: Tensor) -> Tensor:
        total = weight
        for folds in self.changes:
            total = total + (folded(weight, folds) - weight)
        return total

    def fold_rows(self, name: str, weight: Tensor, first: int) -> Tensor | None:
        total = weight
        for folds in self.changes:
            if (changed := folded_rows(weight, folds, first)) is None:
                return None
            total = total + (changed - weight)
        return total


def together(several: Sequence[Folds]) -> Folds:
    """The folds of several attachments as one. Raises Unfoldable where their changes of a parameter do not add up."""
    found: Folds = {}
    for full in dict.fromkeys(name for folds in several for name in folds):
        changes = [folds[full] for folds in several if full in folds]
        fixed = [fold.delta for change in changes for fold in change if not fold.delta.adds]
        if len(changes) > 1 and fixed:
            raise Unfoldable(
                f"{full} is changed by {len(changes)} of the adapters, and what {type(fixed[0]).__name__} makes of it "
                "depends on its value, so their changes do not add up: merge one, and train the other on the result"
            )
        found[full] = changes[0] if len(changes) == 1 else [Fold(changes[0][0].name, Summed(changes))]
    return found


@torch.no_grad()
def folded(weight: Tensor, folds: Sequence[Fold]) -> Tensor:
    """Folded in fp32 (fp64 stays fp64)."""
    weight = weight if weight.dtype is torch.float64 else weight.float()
    for name, delta in folds:
        weight = delta.fold(name, weight)
    return weight


@torch.no_grad()
def folded_rows(weight: Tensor, folds: Sequence[Fold], first: int) -> Tensor | None:
    """The same for some rows of the parameter, from `first` on; None where a change takes the whole."""
    found: Tensor | None = weight if weight.dtype is torch.float64 else weight.float()
    for name, delta in folds:
        found = None if found is None else delta.fold_rows(name, found, first)
    return found


def rounded(weight: Tensor, entry: Entry) -> Tensor:
    """A changed tensor, rounded once to the type it is stored in. Raises FormatError where that is not possible."""
    if tuple(weight.shape) != entry.shape:
        raise FormatError(f"{entry.name}: {tuple(weight.shape)} after folding, {entry.shape} before")
    found = weight.to(DTYPES[entry.dtype])
    if found.numel() and not all(isfinite(edge) for edge in torch.aminmax(found)):  # NaN is an edge of whatever has one
        raise FormatError(f"{entry.name}: not finite as {entry.dtype}: the adapter is broken, or the type too narrow")
    return found


def changed(source: BinaryIO, shard: Shard, change: tuple[Entry, Entry], folds: Sequence[Fold]) -> Iterator[Tensor]:
    """A tensor of an open file as the merged file holds it, in blocks of rows one after the other.

    `change`: what the two files say of it. In one piece where a fold takes the whole.
    """
    old, new = change
    for first, part in blocks(old):
        weight = folded_rows(stored(source, shard, part), folds, first)
        if weight is None:
            yield rounded(folded(stored(source, shard, old), folds), new)
            return
        yield rounded(weight, new._replace(shape=part.shape))
