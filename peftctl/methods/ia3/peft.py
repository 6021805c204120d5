"""(IA)3 adapters of the `peft` package: a column of factors for outputs, a row for inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftctl.errors import FormatError
from peftctl.methods._peft import PREFIX, paths_of, refuse, renamed, shortest, task_type
from peftctl.methods.base import Exchange
from peftctl.methods.ia3 import Ia3Config, scaled
from peftctl.skeleton import Skeleton


def write(config: Ia3Config, skeleton: Skeleton, tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    found = scaled(skeleton, config)
    inputs = [m.path for m in found.inputs]
    every = [*found.outputs, *found.inputs]
    names = shortest([m.path for m in every], skeleton)
    if any(m.path.endswith(_ending(names, inputs)) for m in found.outputs):
        names = [m.path for m in every]  # a name alone would not tell outputs from inputs
    keys = {
        "peft_type": "IA3",
        "task_type": task_type(skeleton),
        "inference_mode": True,
        "target_modules": names,
        "feedforward_modules": list(_ending(names, inputs)),
        "fan_in_fan_out": any(m.kind == "Conv1D" for m in every),
        "modules_to_save": None,
        "init_ia3_weights": True,
    }
    stored = {}
    for name, tensor in tensors.items():
        path = name.rpartition(".")[0]
        stored[f"{PREFIX}{path}.ia3_l"] = tensor.reshape((1, -1) if path in inputs else (-1, 1))
    return keys, stored


def _ending(names: Sequence[str], paths: Sequence[str]) -> tuple[str, ...]:
    """The names that one of the paths ends in."""
    return tuple(name for name in names if any(path == name or path.endswith(f".{name}") for path in paths))


def read(
    keys: Mapping[str, Any], skeleton: Skeleton, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    refuse(keys, {"modules_to_save": (None, [])})
    ours = renamed(tensors, {".ia3_l": "scale"}, skeleton)
    odd = [name for name, tensor in ours.items() if tensor.ndim != 2 or 1 not in tensor.shape]
    if odd:
        raise FormatError(f"adapter_model.safetensors: {odd[0]} is {tuple(ours[odd[0]].shape)}, neither row nor column")
    outputs = paths_of(name for name, tensor in ours.items() if tensor.shape[1] == 1)
    inputs = paths_of(name for name, tensor in ours.items() if tensor.shape[1] != 1)
    # from the tensors: the config may say it as names, a regex, or not at all
    block = {
        "name": "ia3",
        "target_modules": shortest(outputs, skeleton),
        "feedforward_modules": shortest(inputs, skeleton),
    }
    return block, {name: tensor.reshape(-1) for name, tensor in ours.items()}


EXCHANGE = Exchange("IA3", write, read)
