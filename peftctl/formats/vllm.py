"""What vLLM serves of an adapter in peft's form. https://docs.vllm.ai/en/stable/features/lora/

The rules are those of its `lora/peft_helper.py`, `lora/lora_model.py` and `config/lora.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be; a rank below it is padded
DEFAULT_RANK = 16
_ENDS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
# the linears of the model classes that take LoRA there, single or as parts of what vLLM fuses
_MODULES = frozenset(
    """
    q_proj k_proj v_proj o_proj gate_proj up_proj down_proj qkv_proj gate_up_proj query_key_value dense
    dense_h_to_4h dense_4h_to_h out_proj fc1 fc2 embed_tokens lm_head
    """.split()
)


def problems(keys: Mapping[str, Any], stored: Iterable[str]) -> list[str]:
    """Why vLLM would not load the folder, or would serve something else than was trained; empty when it serves it."""
    if keys["peft_type"] != "LORA":
        return [f"it serves LoRA alone, not {keys['peft_type']}"]
    found = []
    if keys.get("use_dora"):
        found.append("it has no DoRA")
    if keys.get("modules_to_save"):
        found.append("it refuses saved modules")
    if keys.get("bias", "none") != "none":
        found.append("it refuses biases")
    if keys.get("rank_pattern") or keys.get("alpha_pattern"):
        found.append("it scales all modules by one alpha and one rank, whatever the patterns say")
    if keys["r"] > RANKS[-1]:
        found.append(f"its largest rank is {RANKS[-1]}, not {keys['r']}")
    if keys.get("target_parameters"):
        found.append("it has no products of experts in this form")
    named = {name.split(".")[-2] for name in keys.get("target_parameters", ())} | {"base_layer"}  # said above
    unknown = sorted({path.rsplit(".", 1)[-1] for path in _paths(stored)} - _MODULES - named)
    if unknown:
        found.append(f"it knows no module {', '.join(unknown)}")
    return found


def _paths(stored: Iterable[str]) -> set[str]:
    """The modules of the products among these tensors."""
    return {name.removesuffix(end) for name in stored for end in _ENDS if name.endswith(end)}


def notes(keys: Mapping[str, Any]) -> list[str]:
    """What must be said to vLLM on its command line."""
    rank = keys["r"]
    least = next(bound for bound in RANKS if bound >= rank)
    return [f"start vLLM with --max-lora-rank {least}: the rank is {rank}"] if rank > DEFAULT_RANK else []
