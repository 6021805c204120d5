"""LoRA adapters of the `peft` package, written with its long-standing keys alone so that old versions load them.

What peft lacks is written as a plain product of a larger rank: a start that is taken away, parts of a fused weight.
Products of experts alone ask for a newer peft, of 0.18 or later (`parameters.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from peftctl.errors import FormatError
from peftctl.methods._biases import biased
from peftctl.methods._peft import PREFIX, number, paths_of, refuse, renamed, shortest, targeting
from peftctl.methods.base import Exchange
from peftctl.methods.lora import LoraConfig, parameters
from peftctl.methods.lora.places import Place, copies, pattern, places
from peftctl.skeleton import EXPERTS, Skeleton

HARMLESS: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
}
_NAMES = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
}
_BIASES = {".base_layer.bias": "bias", ".bias": "bias"}


def write(config: LoraConfig, skeleton: Skeleton, tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    found = places(skeleton, config).places
    stored: dict[str, Any] = {}
    modules, matrices = parameters.apart([one.module.path for one in found], skeleton)
    stems = {module.path: stem for stem, module in parameters.stems(skeleton, matrices).items()}
    for one in found:
        a, b = _plain(one, tensors)
        if one.module.kind in EXPERTS:
            a, b = parameters.flat(a, b)
        embedding = one.module.kind == "Embedding"
        for letter, tensor in (("A", a), ("B", b)):
            end = f"lora_embedding_{letter}" if embedding else f"lora_{letter}.weight"
            stored[f"{PREFIX}{stems.get(one.module.path, one.module.path)}.{end}"] = tensor
    wrapped = {one.module.path for one in found}
    for module in biased(skeleton, "method.bias") if config.bias != "none" else ():
        inside = "base_layer." if module.path in wrapped else ""
        if f"{module.path}.bias" in tensors:
            stored[f"{PREFIX}{module.path}.{inside}bias"] = tensors[f"{module.path}.bias"]
    keys = targeting("LORA", skeleton, modules) | _ranks(config, skeleton, found)
    if matrices:
        keys["target_parameters"] = parameters.named(skeleton, matrices)
    return keys | {"bias": config.bias, "init_lora_weights": True}, stored


def _plain(one: Place, tensors: Mapping[str, Any]) -> tuple[Any, Any]:
    """A place's change as one product: (rank, in) and (out, rank), of experts one for each."""
    import torch

    path, below, beside = one.module.path, [], []
    for name, rows in one.parts.items() or {"": None}.items():
        at = f"{path}.{name}." if name else f"{path}."
        a, b = tensors[f"{at}a"], tensors[f"{at}b"]
        pairs = [(a, b)]
        if f"{at}a0" in tensors:
            a0, b0 = tensors[f"{at}a0"], tensors[f"{at}b0"]
            pairs = [(a - a0, b), (a0, b - b0)]  # as the delta computes it: nothing large cancels
        for a, b in pairs:
            below.append(a)
            wide = b if rows is None else b.new_zeros(one.module.out_features, b.shape[1])
            beside.append(b if rows is None else wide.index_copy(0, torch.tensor(rows, device=b.device), b))
    return (below[0], beside[0]) if len(below) == 1 else (torch.cat(below, dim=-2), torch.cat(beside, dim=-1))


def _ranks(config: LoraConfig, skeleton: Skeleton, found: Sequence[Place]) -> dict[str, Any]:
    """Rank and alpha: those of most modules, and patterns for the others."""
    stored = {one.module.path: _stored_rank(one, config) for one in found}
    (usual, _), *others = Counter(stored.values()).most_common()
    rank, alpha = usual
    keys: dict[str, Any] = {
        "r": rank,
        "lora_alpha": number(alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.rank_stabilized,
    }
    named = {
        name: value
        for value, _ in others
        for name in shortest([path for path, own in stored.items() if own == value], skeleton)
    }
    if named:
        keys["rank_pattern"] = {name: own for name, (own, _) in named.items() if own != rank}
        keys["alpha_pattern"] = {name: number(own) for name, (_, own) in named.items() if own != alpha}
    return keys


def _stored_rank(one: Place, config: LoraConfig) -> tuple[int, float]:
    """Rank and alpha as they are written: the scale stays what it is."""
    times = copies(config, len(one.parts))
    return one.rank * times, one.alpha * (times**0.5 if config.rank_stabilized else times)


def read(
    keys: Mapping[str, Any], skeleton: Skeleton, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    refuse(keys, HARMLESS)
    biases = _BIASES if keys.get("bias") not in (None, "none") else {}
    # peft adds the base's own embedding when that is targeted
    own = {name: tensor for name, tensor in tensors.items() if not name.endswith(".base_layer.weight")}
    experts, own = parameters.read(keys.get("target_parameters") or [], skeleton, own)
    found = renamed(own, _NAMES | biases, skeleton) if own or not experts else {}
    trained = {name: tensor for name, tensor in found.items() if name.endswith(".bias")}
    ours = experts | {name: tensor for name, tensor in found.items() if name not in trained}
    paths = paths_of(ours)
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
        "rank_pattern": _patterns(keys.get("rank_pattern"), paths, int),
        "alpha_pattern": _patterns(keys.get("alpha_pattern"), paths, float),
        "bias": _bias(trained, paths),
    }
    return block, ours | trained


def _patterns(found: Mapping[str, Any] | None, paths: Sequence[str], kind: type) -> dict[str, Any]:
    """Those patterns of a file that say something about a module in it."""
    used = {key for key in found or {} if any(pattern({key: True}, path, False) for path in paths)}
    return {key: kind(value) for key, value in (found or {}).items() if key in used}


def _bias(trained: Mapping[str, Any], paths: Sequence[str]) -> str:
    """What the biases in a file are, whatever its config says: peft's own files may lack what that promises."""
    if not trained:
        return "none"
    return "lora_only" if {name.removesuffix(".bias") for name in trained} <= set(paths) else "all"


EXCHANGE = Exchange("LORA", write, read, lambda keys: not keys.get("use_dora"))
