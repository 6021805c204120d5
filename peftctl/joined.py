"""Parameters that the files hold in parts (experts one by one): put together, folded and taken apart again.

By transformers' own mapping and its reverse. One rule's parameters are in memory at a time, and what is written under
a stored name is what loading makes the folded parameter of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftctl.errors import FormatError
from peftctl.folding import DTYPES, Fold, Folds, folded, rounded, stored
from peftctl.formats.names import Parts
from peftctl.formats.shards import Entry, Shard

# what transformers' operations raise where tensors are not as they want them
UNSERVED = (ValueError, KeyError, RuntimeError, TypeError, AttributeError, NotImplementedError)


class Joined:
    """The stored tensors of one rule, of which some parameters change."""

    def __init__(self, parts: Parts, folds: Mapping[str, Sequence[Fold]], places: Mapping[str, tuple[Shard, Entry]]):
        self.parts = parts
        self.folds = folds  # by the mapping's names of the parameters
        self.places = places
        self._ready: dict[str, Tensor] = {}

    def take(self, name: str, new: Mapping[str, Entry]) -> Tensor:
        """The changed tensor of a stored name, once. `new`: the entries of the merged files."""
        if not self._ready:
            self._ready = self._changed(new)
        return self._ready.pop(name)

    @torch.no_grad()
    def _changed(self, new: Mapping[str, Entry]) -> dict[str, Tensor]:
        whole = self._read()
        for name, folds in self.folds.items():
            whole[name] = folded(whole[name], folds)
        return {name: rounded(tensor, new[name]) for name, tensor in self.parts.parted(whole).items()}

    def _read(self) -> dict[str, Tensor]:
        """The parameters as they are. Raises FormatError unless they can be taken apart again, bit for bit."""
        found = {}
        for name in self.parts.sources:
            shard, entry = self.places[name]
            with shard.path.open("rb") as source:
                found[name] = stored(source, shard, entry)
        whole = self.parts.joined(found)
        for name, tensor in self.parts.parted(whole).items():
            if not torch.equal(tensor, found[name]):
                raise FormatError(f"{name}: transformers' own mapping does not lead back to it; serve it unmerged")
        return whole


def joined(
    rules: Iterable[Parts], folds: Folds, places: Mapping[str, tuple[Shard, Entry]], shapes: Mapping[str, Any]
) -> tuple[dict[str, Joined], set[str]]:
    """What changes of what is put together on loading, by stored name; and the parameters that are served so.

    Only where every stored tensor is a plain one and, by their shapes, the way back leads to the same names.
    """
    found, served = dict[str, Joined](), set[str]()
    for parts in rules:
        made = _made(parts, places)
        own = {name: folds[full] for name in made if (full := parts.parameter(name)) in folds}
        if own and all(made[name].shape == shapes[parts.parameter(name)] for name in own):
            one = Joined(parts, own, places)
            found |= dict.fromkeys(parts.sources, one)
            served |= {parts.parameter(name) for name in own}
    return found, served


def _made(parts: Parts, places: Mapping[str, tuple[Shard, Entry]]) -> dict[str, Tensor]:
    """The same, but nothing where it cannot be gone back."""
    found = made(parts, places)
    try:
        back = parts.parted(found) if found else {}
    except UNSERVED:
        return {}
    return found if all(back[name].shape == places[name][1].shape for name in back) else {}


def made(parts: Parts, places: Mapping[str, tuple[Shard, Entry]]) -> dict[str, Tensor]:
    """The parameters that a rule makes, without values; nothing where it does not serve these tensors."""
    entries = {name: places[name][1] for name in parts.sources}
    if any(entry.dtype not in DTYPES for entry in entries.values()):
        return {}
    bare = {n: torch.empty(e.shape, dtype=DTYPES[e.dtype], device="meta") for n, e in entries.items()}
    try:
        return parts.joined(bare)
    except UNSERVED:
        return {}
