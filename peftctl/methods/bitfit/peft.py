"""Biases as a LoRA of the `peft` package: `bias: all` with every bias as it is now, and one product that is 0.

peft had that form long before it had one for biases alone, and old versions load it.
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


def as_lora(stored: Stored) -> Write:
    return partial(_write, stored=stored)


def _write(
    config: BitfitConfig, skeleton: Skeleton, tensors: Mapping[str, Any], *, stored: Stored
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Raises FormatError for a bias that the base does not have."""
    import torch

    changes = {name.removesuffix(".bias"): tensor.detach().cpu() for name, tensor in tensors.items()}
    present = [module.path for module in biased(skeleton, "method.biases")]
    lacking = [path for path in changes if path not in present]
    if lacking:
        raise FormatError(
            f"the peft package holds no bias that the base lacks, as {lacking[0]} and {len(lacking) - 1} more; "
            "serve the adapter with peftctl generate"
        )
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
