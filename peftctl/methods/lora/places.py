"""Where products sit, and of what rank and scale each is; which biases are trained beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from peftctl import qkv
from peftctl.errors import TargetError, suggest
from peftctl.methods._biases import biased
from peftctl.methods._lowrank import scale
from peftctl.methods.lora import LoraConfig
from peftctl.skeleton import EXPERTS, LINEAR_OR_EMBEDDING, Module, Skeleton, covered, select

SERVED = LINEAR_OR_EMBEDDING | EXPERTS
V = TypeVar("V")


class Place(NamedTuple):
    """A module with one product, or one for each part of its output."""

    module: Module
    rank: int
    alpha: float
    scale: float
    parts: Mapping[str, qkv.Rows]  # none: the whole output

    def sizes(self, train_a: bool) -> dict[str, int]:
        """Trained numbers, by the product's name."""
        into = self.module.in_features if train_a else 0
        outs = {f"{self.module.path}.{part}": len(rows) for part, rows in self.parts.items()}
        outs = outs or {self.module.path: self.module.out_features}
        return {path: self.module.matrices * self.rank * (into + out) for path, out in outs.items()}

    @property
    def labels(self) -> list[str]:
        """How the module, or its parts, are called."""
        last = self.module.path.rpartition(".")[2]
        return [f"{last}.{part}" for part in self.parts] or [last]


class Places(NamedTuple):
    places: list[Place]
    summary: str  # "84 modules in 12 of 12 layers: q_proj, ..."


def places(skeleton: Skeleton, config: LoraConfig) -> Places:
    """Raises TargetError where a product cannot be."""
    modules, parts = _chosen(skeleton, config)
    for name, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        _used(f"method.{name}", patterns, modules)
    found = [_place(module, config, parts.get(module.path, {})) for module in modules]
    for place in found:
        _possible(place, config)
    names = dict.fromkeys(label for place in found for label in place.labels)
    layers = covered(skeleton, [module.path for module in modules])
    return Places(found, f"{len(found)} modules in {layers}: {', '.join(names)}")


def _chosen(skeleton: Skeleton, config: LoraConfig) -> tuple[Sequence[Module], dict[str, dict[str, qkv.Rows]]]:
    """The modules, and of fused ones the parts that are meant."""
    names = config.target_modules
    if isinstance(names, str):
        return select(skeleton, names, kinds=SERVED, layers=config.layers).modules, {}
    sorted_ = qkv.sort(skeleton, names)
    if sorted_.whole and sorted_.parts:
        whole = {m.path for m in select(skeleton, sorted_.whole, kinds=SERVED).modules}
        if twice := sorted(whole & set(sorted_.parts)):
            raise TargetError(f"method.target_modules: {twice[0]} is named whole and in part; name it once")
    wanted = [*sorted_.whole, *sorted_.parts]
    return select(skeleton, wanted, kinds=SERVED, layers=config.layers).modules, sorted_.parts


def _place(module: Module, config: LoraConfig, parts: Mapping[str, qkv.Rows]) -> Place:
    rank = pattern(config.rank_pattern, module.path, config.rank)
    alpha = pattern(config.alpha_pattern, module.path, 2 * rank if config.alpha is None else config.alpha)
    return Place(module, rank, alpha, scale(rank, alpha, config.rank_stabilized), parts)


def pattern(patterns: Mapping[str, V], path: str, otherwise: V) -> V:
    """The value of the first pattern that a path, or its end from a dot on, is; as peft reads them."""
    return next((value for key, value in patterns.items() if _matches(key, path)), otherwise)


def _matches(key: str, path: str) -> bool:
    return re.fullmatch(rf"(?:.*\.)?(?:{key})", path) is not None


def _used(key: str, patterns: Iterable[str], modules: Sequence[Module]) -> None:
    """Refuse a pattern that says nothing about any of the modules."""
    for name in patterns:
        try:
            used = any(_matches(name, module.path) for module in modules)
        except re.error as error:
            raise TargetError(f"{key}: {name!r} is not a regular expression: {error}") from None
        if not used:
            near = suggest(name, {module.path.rpartition(".")[2] for module in modules})
            raise TargetError(f"{key}: {name!r} matches none of the chosen modules{near or ''}")


def copies(config: LoraConfig, parts: int) -> int:
    """How many products of the rank one is stored as: each part's, and with its start apart twice that."""
    return max(1, parts) * (1 if config.init == "default" else 2)


def _possible(place: Place, config: LoraConfig) -> None:
    module, times = place.module, copies(config, len(place.parts))
    whole = min(module.in_features, module.out_features)
    most = min(whole // times, *map(len, place.parts.values())) if place.parts else whole // times
    if place.rank > most:
        key = "rank" if place.rank == config.rank else "rank_pattern"
        several = f"as {module.path} is to hold {times} such products"
        why = several if times > 1 else f"the smaller side of {module.path}{' or of its part' if place.parts else ''}"
        raise TargetError(f"method.{key}: {place.rank} is above {most}, {why}; use at most {most}")
    if module.kind in EXPERTS and config.dropout:
        raise TargetError(
            f"method.dropout: {config.dropout:g} has no place at {module.path}, as the input of experts is theirs "
            "alone; set it to 0"
        )
    if module.kind != "Embedding":
        return
    # a subclass may look rows up by something other than its input (OPT's positions)
    if not (module.type == "Embedding" or module.type.endswith("WordEmbedding")):
        raise TargetError(
            f"method.target_modules: {module.path} is a {module.type}, which lora cannot adapt; leave it out"
        )
    if config.init != "default" or not config.train_a:
        what = f"init: {config.init}" if config.train_a else "train_a: false"
        raise TargetError(f"method.{what} is for linears, and {module.path} is an embedding; leave it out")


def biases(skeleton: Skeleton, which: str, chosen: Sequence[Place]) -> list[Module]:
    """The modules whose bias is trained. Raises TargetError when it would be none."""
    if which == "none":
        return []
    paths = {place.module.path for place in chosen}
    found = [m for m in biased(skeleton, "method.bias") if which == "all" or m.path in paths]
    if not found:
        where = "" if which == "all" else "the chosen modules of "
        raise TargetError(f"method.bias: there is no bias in {where}{skeleton.architecture}; set it to none")
    return found
