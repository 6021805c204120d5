"""What methods with virtual tokens have in common: the files of the `peft` package, and embeddings before the tokens'.

Torch-free; the tensors' part is in `_rows.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftctl.errors import FormatError
from peftctl.methods._blocks import blocks, input_embedding
from peftctl.methods._peft import task_type
from peftctl.skeleton import Skeleton

KEY = "prompt_embeddings"


def embedded(skeleton: Skeleton) -> int:
    """Width of a token's embedding. Raises TargetError where rows cannot stand before it, as with an encoder beside."""
    blocks(skeleton)
    return input_embedding(skeleton).out_features


def peft_keys(peft_type: str, skeleton: Skeleton, tokens: int, width: int, heads: int) -> dict[str, Any]:
    """What peft's config says of virtual tokens."""
    return {
        "peft_type": peft_type,
        "task_type": task_type(skeleton),
        "inference_mode": True,
        "num_virtual_tokens": tokens,
        "num_layers": skeleton.dimensions.layers,
        "token_dim": width,
        "num_attention_heads": heads,
        "num_transformer_submodules": 1,
    }


def peft_rows(keys: Mapping[str, Any], tensors: Mapping[str, Any], width: int, whose: str) -> Any:
    """The one tensor of peft's file, (tokens, width). Raises FormatError; `whose` says what is that wide."""
    if set(tensors) != {KEY}:
        raise FormatError(f"adapter_model.safetensors holds {', '.join(sorted(tensors))}; {KEY} alone is expected")
    if keys.get("num_transformer_submodules") not in (None, 1):
        raise FormatError("adapter_config.json: num_transformer_submodules is not 1, which cannot be read yet")
    rows = tensors[KEY]
    if rows.ndim != 2 or rows.shape[1] != width:
        raise FormatError(f"adapter_model.safetensors: {KEY} is {tuple(rows.shape)}, but {whose} are {width} wide")
    return rows
