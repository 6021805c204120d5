"""A model folder with a head that its base's files do not hold: one more file, and an index over all of them.

transformers takes a file's names either all with the trunk's prefix or all without it, so with a head beside them all
come under the model's own names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftctl.formats import names
from peftctl.formats.shards import INDEX, Entry, Shard
from peftctl.surgery import skeleton
from peftctl.task import Task, labelled


@dataclass(frozen=True)
class Head:
    """`tensors`: what is added. `replaced`: stored tensors of a head for other labels. `names`: stored name -> ours."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    replaced: frozenset[str] = frozenset()
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def files(self, found: Sequence[Shard]) -> list[str]:
        """What the merged shards are called: a plain model.safetensors would be read without its index."""
        if not self.tensors:
            return [shard.path.name for shard in found]
        return [_file(number, len(found) + 1) for number in range(1, len(found) + 1)]

    def write(self, folder: Path, entries: Sequence[Sequence[Entry]], found: Sequence[Shard]) -> None:
        """The head's file and the index. Raises OSError."""
        if not self.tensors:
            return
        from safetensors.torch import save_file

        last = _file(len(found) + 1, len(found) + 1)
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, folder / last, {"format": "pt"})
        places = {new.name: file for file, own in zip(self.files(found), entries, strict=True) for new in own}
        places |= dict.fromkeys(self.tensors, last)
        total = self.size + sum(new.end - new.start for own in entries for new in own)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _file(number: int, of: int) -> str:
    return f"model-{number:05d}-of-{of:05d}.safetensors"


@torch.no_grad()
def new(model: Any, folds: Mapping[str, Sequence[Any]], found: Sequence[Shard]) -> Head:
    """The part of a head that the base's files lack or have for other labels; in fp32, as it was trained.

    `folds`: per parameter, its changes; those of a head put its values in the place of whatever was there.
    """
    stored = {entry.name: entry.shape for shard in found for entry in shard.entries}
    places = names.parameters(model, stored)
    ours = {module.path for module in skeleton(model).added}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    held = {place.parameter: name for name, place in places.items()}
    fresh = [
        full for full in folds if full.rpartition(".")[0] in ours and stored.get(held.get(full, "")) != shapes[full]
    ]
    if not fresh:
        return Head()
    values = {full: folds[full][-1].delta.fold(folds[full][-1].name, torch.zeros(shapes[full])) for full in fresh}
    return Head(
        {full: value.detach().cpu() for full, value in values.items()},
        frozenset(held[full] for full in fresh if full in held),
        {name: place.parameter for name, place in places.items() if place.whole},
    )


def config(settings: Mapping[str, Any], task: Task, model: Any) -> dict[str, Any]:
    """The base's config.json as that of a model for a task."""
    kept = {key: value for key, value in settings.items() if key not in ("num_labels", "problem_type")}
    return kept | labelled(task) | {"architectures": [type(model).__name__]}
