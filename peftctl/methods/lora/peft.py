"""LoRA adapters of the `peft` package, written with its long-standing keys alone so that old versions load them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftctl.errors import FormatError
from peftctl.methods._peft import number, place, task_type
from peftctl.methods.base import Exchange
from peftctl.methods.lora import LoraConfig
from peftctl.skeleton import Skeleton

# what a reader of peft's config must not overlook, with the values that change nothing
REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
}
_NAMES = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
}


def write(config: LoraConfig, skeleton: Skeleton, tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    kinds = {module.path: module.kind for module in skeleton.modules}
    keys = {
        "peft_type": "LORA",
        "task_type": task_type(skeleton),
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": number(2 * config.rank if config.alpha is None else config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": shortest(paths, skeleton),
        "bias": "none",
        "fan_in_fan_out": any(kinds[path] == "Conv1D" for path in paths),
        "modules_to_save": None,
        "use_rslora": config.rank_stabilized,
        "init_lora_weights": True,
    }
    return keys, {_peft_name(name, kinds): tensor for name, tensor in tensors.items()}


def _peft_name(name: str, kinds: Mapping[str, str]) -> str:
    path, _, letter = name.rpartition(".")
    end = f"lora_embedding_{letter.upper()}" if kinds[path] == "Embedding" else f"lora_{letter.upper()}.weight"
    return f"base_model.model.{path}.{end}"


def shortest(paths: Sequence[str], skeleton: Skeleton) -> list[str]:
    """Names that match these modules and no others: their last parts where these will do, else whole paths."""
    ends = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))
    matched = {m.path for m in skeleton.modules if m.path.rsplit(".", 1)[-1] in ends}
    return ends if matched == set(paths) else list(paths)


def read(
    keys: Mapping[str, Any], skeleton: Skeleton, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    for key, harmless in REFUSED.items():
        if keys.get(key) not in harmless:
            raise FormatError(f"adapter_config.json: {key} is {keys[key]!r}, which cannot be read yet")
    ours: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name.endswith(".base_layer.weight"):
            continue  # peft adds the base's own embedding when that is targeted
        path, end = place(name, _NAMES, skeleton)
        ours[f"{path}.{_NAMES[end]}"] = tensor
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in ours))
    if not paths:
        raise FormatError("adapter_model.safetensors holds no lora_A or lora_B")
    block = {
        "name": "lora",
        "rank": int(keys.get("r", 8)),  # peft's defaults
        "alpha": float(keys.get("lora_alpha", 8)),
        "dropout": float(keys.get("lora_dropout", 0.0)),
        # from the tensors: the config may say it as names, a regex, `all-linear`, with or without a layer range
        "target_modules": shortest(paths, skeleton),
        "rank_stabilized": bool(keys.get("use_rslora", False)),
    }
    return block, ours


EXCHANGE = Exchange("LORA", write, read, lambda keys: not keys.get("use_dora"))
