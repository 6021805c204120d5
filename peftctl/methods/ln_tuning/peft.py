"""LN-tuning of the `peft` package: whole copies of the norms' weights and biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftctl.methods._peft import PREFIX, paths_of, refuse, renamed, shortest, task_type
from peftctl.methods.base import Exchange
from peftctl.methods.ln_tuning import LnTuningConfig, norms
from peftctl.skeleton import Skeleton

NAMES = {".ln_tuning_layers.weight": "weight", ".ln_tuning_layers.bias": "bias"}


def write(
    config: LnTuningConfig, skeleton: Skeleton, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    keys = {
        "peft_type": "LN_TUNING",
        "task_type": task_type(skeleton),
        "inference_mode": True,
        "target_modules": shortest([m.path for m in norms(skeleton, config).modules], skeleton),
        "modules_to_save": None,
    }
    stored = {}
    for name, tensor in tensors.items():
        path, _, parameter = name.rpartition(".")
        stored[f"{PREFIX}{path}.ln_tuning_layers.{parameter}"] = tensor
    return keys, stored


def read(
    keys: Mapping[str, Any], skeleton: Skeleton, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    refuse(keys, {"modules_to_save": (None, [])})
    ours = renamed(tensors, NAMES, skeleton)
    return {"name": "ln-tuning", "target_modules": shortest(paths_of(ours), skeleton)}, ours


EXCHANGE = Exchange("LN_TUNING", write, read)
