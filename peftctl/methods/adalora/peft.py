"""AdaLoRA adapters of the `peft` package: the factors, without what chose among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftctl.errors import FormatError
from peftctl.methods._peft import PREFIX, number, paths_of, refuse, renamed, shortest, targeting
from peftctl.methods.adalora import AdaloraConfig
from peftctl.methods.base import Exchange
from peftctl.skeleton import Skeleton

HARMLESS: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "use_dora": (None, False),
    "use_rslora": (None, False),
}
NAMES = {"a": "lora_A", "b": "lora_B", "e": "lora_E"}


def write(
    config: AdaloraConfig, skeleton: Skeleton, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    paths = paths_of(tensors)
    keys = targeting("ADALORA", skeleton, paths) | {
        "target_r": config.rank,
        "init_r": config.first_rank,
        "lora_alpha": number(config.scale * config.first_rank),
        "lora_dropout": config.dropout,
        "init_lora_weights": True,
        # peft wants a schedule even of what is trained already
        **{"total_step": 1, "tinit": 0, "tfinal": 0, "deltaT": config.interval},
        "beta1": config.importance_beta,
        "beta2": config.uncertainty_beta,
        "orth_reg_weight": config.orthogonality,
    }
    stored: dict[str, Any] = {}
    for path in paths:
        a, b, e, keep = (tensors[f"{path}.{name}"] for name in ("a", "b", "e", "keep"))
        stored |= {f"{PREFIX}{path}.lora_{n}": t for n, t in (("A", a), ("B", b), ("E", (e * keep)[:, None]))}
    return keys, stored


def read(
    keys: Mapping[str, Any], skeleton: Skeleton, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    refuse(keys, HARMLESS)
    found = renamed(tensors, {f".{theirs}": name for name, theirs in NAMES.items()}, skeleton)
    first = int(keys.get("init_r", 12))  # peft's defaults
    kept = {name.partition(".lora_E")[0]: mask for name, mask in (keys.get("rank_pattern") or {}).items()}
    paths = paths_of(found)
    ours: dict[str, Any] = {}
    for path in paths:
        whole = _whole(found, path, first, kept.get(path))
        ours |= {f"{path}.{name}": tensor for name, tensor in whole.items()}
    alpha = float(keys.get("lora_alpha", 8))
    block = {
        "name": "adalora",
        "rank": min(int(keys.get("target_r", 8)), first),
        "initial_rank": first,
        "alpha": alpha if alpha > 0 else float(first),
        "dropout": float(keys.get("lora_dropout", 0.0)),
        "interval": int(keys.get("deltaT", 1)),
        "importance_beta": float(keys.get("beta1", 0.85)),
        "uncertainty_beta": float(keys.get("beta2", 0.85)),
        "orthogonality": float(keys.get("orth_reg_weight", 0.5)),
        "target_modules": shortest(paths, skeleton),
    }
    return block, ours


def _whole(found: Mapping[str, Any], path: str, rank: int, kept: list[bool] | None) -> dict[str, Any]:
    """The tensors of one module at its first rank: peft's files leave out the triplets that were pruned for good."""
    import torch

    keep = torch.ones(rank) if kept is None else torch.tensor(kept).float()
    places = keep.nonzero()[:, 0]
    missing = [f"{PREFIX}{path}.{theirs}" for name, theirs in NAMES.items() if f"{path}.{name}" not in found]
    if missing:
        raise FormatError(f"adapter_model.safetensors lacks {', '.join(missing)}")
    a, b, e = (found[f"{path}.{name}"].float() for name in ("a", "b", "e"))
    if (len(keep), len(a), b.shape[1], e.numel()) != (rank, *(len(places),) * 3):
        raise FormatError(f"adapter_model.safetensors: the factors of {path} do not fit init_r and rank_pattern")
    whole = {
        "a": a.new_zeros(rank, a.shape[1]).index_copy(0, places, a),
        "b": b.new_zeros(b.shape[0], rank).index_copy(1, places, b),
        "e": e.new_zeros(rank).index_copy(0, places, e.flatten()),
    }
    fresh = {f"{kind}_{n}": torch.zeros_like(t) for n, t in whole.items() for kind in ("importance", "uncertainty")}
    return whole | fresh | {"keep": keep}


EXCHANGE = Exchange("ADALORA", write, read)
