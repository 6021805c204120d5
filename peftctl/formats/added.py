"""New tokens' rows in peft's files: the grown matrices whole, as peft writes them for a model that was resized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftctl.base import Base
from peftctl.errors import FormatError
from peftctl.formats.shards import read as read_header
from peftctl.formats.shards import shards
from peftctl.skeleton import NewRows, Skeleton, dotted

if TYPE_CHECKING:
    from torch import Tensor

# how families call what may be resized; peft's file does not say what of it is new
EMBEDDINGS = tuple(
    f"{name}.weight"
    for name in ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "tok_embeddings")
)
OURS = {"rows": "weight", "row_bias": "bias"}  # our name of a part -> the parameter that it is rows of


def apart(skeleton: Skeleton, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors under our names: the new rows, and all others."""
    places = {dotted(path, ours) for path in skeleton.vocabulary for ours in OURS}
    rows = {name: tensor for name, tensor in tensors.items() if skeleton.rows is not None and name in places}
    return rows, {name: tensor for name, tensor in tensors.items() if name not in rows}


def whole(base: Base, skeleton: Skeleton, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The grown matrices by their full names, tied ones once, as loading ties them again; in the type of the rows.

    Raises FormatError where the base's files do not hold one as it is.
    """
    import torch

    found: dict[str, Any] = {}
    for name, tensor in rows.items():
        path, _, ours = name.rpartition(".")
        full = dotted(path, OURS[ours])
        own = stored(base, skeleton, full).to(tensor.dtype)
        new = skeleton.rows
        assert new is not None
        found[full] = torch.cat([own[: new.first], tensor.detach().cpu(), own[new.first + new.number :]])
    return found


def stored(base: Base, skeleton: Skeleton, full: str) -> Tensor:
    """A parameter of the base from its files, which may leave out the model's prefix, or hold a tied one elsewhere."""
    from safetensors import safe_open

    if base.weights is None:
        raise FormatError(f"{base.name} has no weights yet, so they cannot be written")
    tied = {full, *(alias for alias, first in skeleton.tied.items() if first == full)}
    for shard in shards(base.weights):
        for entry in shard.entries:
            if any(name == entry.name or name.endswith(f".{entry.name}") for name in tied):
                with safe_open(shard.path, "pt") as file:
                    tensor: Tensor = file.get_tensor(entry.name)
                return tensor
    raise FormatError(f"{base.name} has no tensor {full} in its files, so it cannot be written")


def cut(skeleton: Skeleton, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The new rows of whole matrices, which come by their full names, under our names; of tied ones once."""
    new, found = skeleton.rows, dict[str, Any]()
    if held and new is None:
        raise FormatError(f"{next(iter(held))} is in the file whole, though no tokens were added")
    for full, tensor in held.items():
        path, _, parameter = skeleton.tied.get(full, full).rpartition(".")
        ours = next(own for own, theirs in OURS.items() if theirs == parameter)
        assert new is not None
        found[dotted(path, ours)] = tensor[new.slice]
    return found


def name(prefix: str, full: str, stored: Iterable[str]) -> str:
    """peft's name of a whole matrix: of a module that is adapted as well, that of what is inside."""
    path, _, parameter = full.rpartition(".")
    wrapped = any(other.startswith(f"{prefix}{path}.lora_") for other in stored)
    return f"{prefix}{path}.base_layer.{parameter}" if wrapped else prefix + full


def held(skeleton: Skeleton, prefix: str, stored: Iterable[str]) -> dict[str, str]:
    """The stored names of whole embeddings and heads, each with its full name here; `prefix` is peft's."""
    known, found = set(stored), dict[str, str]()
    for module in skeleton.modules:
        names = {name(prefix, dotted(module.path, own), known): dotted(module.path, own) for own in module.shapes}
        # a bias may stand there alone
        if module.path in skeleton.vocabulary and name(prefix, dotted(module.path, "weight"), known) in known:
            found |= {theirs: full for theirs, full in names.items() if theirs in known}
    return found


def recorded(facts: Mapping[str, Any], folder: Path) -> NewRows | None:
    """The new tokens that an adapter of ours was trained with; `facts`: what its folder says of the base."""
    own = facts.get("rows")
    try:
        return None if own is None else NewRows(int(own["first"]), tuple(map(str, own["tokens"])), int(own["before"]))
    except (TypeError, KeyError, ValueError):
        raise FormatError(f"{folder}: what is said of its new tokens is not as we write it") from None


def same(facts: Mapping[str, Any], skeleton: Skeleton, folder: Path) -> None:
    """Refuse an adapter with new tokens for a base without them. Raises FormatError."""
    rows = recorded(facts, folder)
    if rows is not None and rows != skeleton.rows:
        told = ", ".join(map(repr, rows.tokens))
        raise FormatError(f"{folder} was trained with model.add_tokens [{told}]: set the same, in the same order")


def guessed(base: Base, weights: Path) -> NewRows | None:
    """The rows by which a base was resized for a file that does not say it; None where it was not."""
    before = base.settings().get("vocab_size")
    if not isinstance(before, int) or not weights.is_file():
        return None
    sizes = {entry.shape[0] for entry in read_header(weights).entries if entry.name.endswith(EMBEDDINGS)}
    grown = [size for size in sizes if size > before]
    return NewRows(before, ("",) * (max(grown) - before), before) if grown else None
