"""DoRA adapters of the `peft` package: those of LoRA with a magnitude beside the factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftctl.methods._peft import PREFIX, number, paths_of, refuse, renamed, shortest, targeting
from peftctl.methods.base import Exchange
from peftctl.methods.dora import DoraConfig
from peftctl.skeleton import Skeleton

HARMLESS: dict[str, tuple[Any, ...]] = {
    "lora_bias": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
}
NAMES = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def write(config: DoraConfig, skeleton: Skeleton, tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    keys = targeting("LORA", skeleton, paths_of(tensors)) | {
        "r": config.rank,
        "lora_alpha": number(2 * config.rank if config.alpha is None else config.alpha),
        "lora_dropout": config.dropout,
        "use_dora": True,
        "use_rslora": config.rank_stabilized,
        "init_lora_weights": True,
    }
    named = {name.rpartition("."): tensor for name, tensor in tensors.items()}
    return keys, {f"{PREFIX}{path}.{NAMES[own]}": tensor for (path, _, own), tensor in named.items()}


def read(
    keys: Mapping[str, Any], skeleton: Skeleton, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    refuse(keys, HARMLESS)
    ours = renamed(tensors, {f".{theirs}": own for own, theirs in NAMES.items()}, skeleton)
    block = {
        "name": "dora",
        "rank": int(keys.get("r", 8)),  # peft's defaults
        "alpha": float(keys.get("lora_alpha", 8)),
        "dropout": float(keys.get("lora_dropout", 0.0)),
        "target_modules": shortest(paths_of(ours), skeleton),
        "rank_stabilized": bool(keys.get("use_rslora", False)),
    }
    return block, ours


EXCHANGE = Exchange("LORA", write, read, lambda keys: bool(keys.get("use_dora")))
