"""VeRA adapters of the `peft` package: the vectors, and the random matrices once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftctl.methods._peft import PREFIX, paths_of, refuse, renamed, shortest, targeting
from peftctl.methods.base import Exchange
from peftctl.methods.vera import VeraConfig
from peftctl.skeleton import Skeleton

HARMLESS: dict[str, tuple[Any, ...]] = {"bias": (None, "none"), "modules_to_save": (None, [])}
NAMES = {"d": "vera_lambda_d", "b": "vera_lambda_b"}
SHARED = {"a": "base_model.vera_A", "b": "base_model.vera_B"}


def write(config: VeraConfig, skeleton: Skeleton, tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    own = {name: tensor for name, tensor in tensors.items() if name not in SHARED}
    keys = targeting("VERA", skeleton, paths_of(own)) | {
        "r": config.rank,
        "projection_prng_key": config.projection_seed,
        "save_projection": True,
        "vera_dropout": config.dropout,
        "d_initial": config.d_initial,
    }
    named = {name.rpartition("."): tensor for name, tensor in own.items()}
    vectors = {f"{PREFIX}{path}.{NAMES[last]}": tensor for (path, _, last), tensor in named.items()}
    return keys, vectors | {theirs: tensors[ours] for ours, theirs in SHARED.items()}


def read(
    keys: Mapping[str, Any], skeleton: Skeleton, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    refuse(keys, HARMLESS)
    own = {name: tensor for name, tensor in tensors.items() if name not in SHARED.values()}
    ours = renamed(own, {f".{theirs}": name for name, theirs in NAMES.items()}, skeleton)
    paths = paths_of(ours)
    block = {
        "name": "vera",
        "rank": int(keys.get("r", 256)),  # peft's defaults
        "d_initial": float(keys.get("d_initial", 0.1)),
        "dropout": float(keys.get("vera_dropout", 0.0)),
        "projection_seed": int(keys.get("projection_prng_key", 0)),
        "target_modules": shortest(paths, skeleton),
    }
    shared = {name: tensors[theirs] for name, theirs in SHARED.items() if theirs in tensors}
    return block, ours | (shared or _drawn(block, skeleton, paths))


def _drawn(block: Mapping[str, Any], skeleton: Skeleton, paths: list[str]) -> dict[str, Any]:
    """The matrices of a file that leaves them to its seed (`save_projection: false`)."""
    from peftctl.methods.vera.delta import drawn

    modules = [module for module in skeleton.modules if module.path in set(paths)]
    into, out = max(m.in_features for m in modules), max(m.out_features for m in modules)
    return dict(zip("ab", drawn(block["rank"], into, out, block["projection_seed"]), strict=True))


EXCHANGE = Exchange("VERA", write, read)
