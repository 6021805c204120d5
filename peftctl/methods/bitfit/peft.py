"""Biases in the `peft` package: as a LoRA with `bias: all`, every bias as it is now, and one product that is 0.

peft had that form long before it had one for biases alone, and old versions load it. Biases that the base lacks have
that other form, BEFT, which knows linears only.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from peftctl.errors import FormatError
from peftctl.methods._biases import biased
from peftctl.methods._peft import PREFIX, targeting
from peftctl.methods.base import Stored, Write
from peftctl.methods.bitfit import BitfitConfig
from peftctl.skeleton import LINEAR, Skeleton


def as_another(stored: Stored) -> Write:
    return partial(_write, stored=stored)


def _write(
    config: BitfitConfig, skeleton: Skeleton, tensors: Mapping[str, Any], *, stored: Stored
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Raises FormatError where there are biases that the base lacks beside others than linears'."""
    import torch

    changes = {name.removesuffix(".bias"): tensor.detach().cpu() for name, tensor in tensors.items()}
    present = [module.path for module in biased(skeleton, "method.biases")]
    lacking = [path for path in changes if path not in present]
    if lacking:
        return _beft(skeleton, changes, lacking[0])
    place = next(m for m in skeleton.modules if m.kind in LINEAR and m.path != skeleton.head)
    found = {
        f"{PREFIX}{place.path}.lora_A.weight": torch.zeros(1, place.in_features),
        f"{PREFIX}{place.path}.lora_B.weight": torch.zeros(place.out_features, 1),
    }
    for path in present:
        bias = stored(f"{path}.bias").float()
        inside = "base_layer." if path == place.path else ""
        found[f"{PREFIX}{path}.{inside}bias"] = bias + changes[path].float() if path in changes else bias
    keys = targeting("LORA", skeleton, [place.path]) | {"r": 1, "lora_alpha": 1, "lora_dropout": 0.0}
    return keys | {"bias": "all", "init_lora_weights": True}, found


def _beft(skeleton: Skeleton, changes: Mapping[str, Any], lacking: str) -> tuple[dict[str, Any], dict[str, Any]]:
    kinds = {module.path: module.kind for module in skeleton.modules}
    other = [path for path in changes if kinds[path] != "Linear"]
    if other:
        beside = f"that of a {kinds[other[0]]} ({other[0]})"
        raise FormatError(
            f"the peft package has no form for a bias that the base lacks ({lacking}) beside {beside}; "
            "serve the adapter with peftctl generate"
        )
    common = targeting("BEFT", skeleton, list(changes))
    keys = {
        key: common[key] for key in ("peft_type", "task_type", "inference_mode", "target_modules", "modules_to_save")
    }
    return keys, {f"{PREFIX}{path}.beft_bias": change[None] for path, change in changes.items()}
