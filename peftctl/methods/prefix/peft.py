"""Prefixes of the `peft` package: the keys and values alone, so that what made them is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftctl.errors import FormatError
from peftctl.methods._peft import task_type
from peftctl.methods.base import Exchange
from peftctl.methods.prefix import PrefixConfig, cached
from peftctl.skeleton import Skeleton

KEY = "prompt_embeddings"


def write(
    config: PrefixConfig, skeleton: Skeleton, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    from peftctl.methods.prefix.delta import project

    size = cached(skeleton)
    width = size.kv_heads * size.head_dim
    keys = {
        "peft_type": "PREFIX_TUNING",
        "task_type": task_type(skeleton),
        "inference_mode": True,
        "num_virtual_tokens": config.num_virtual_tokens,
        "num_layers": size.layers,
        "token_dim": width,
        "num_attention_heads": size.kv_heads,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": width,
        "prefix_projection": False,  # what is written is already projected
    }
    return keys, {KEY: project({name: tensor.detach() for name, tensor in tensors.items()}).contiguous()}


def read(
    keys: Mapping[str, Any], skeleton: Skeleton, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    if set(tensors) != {KEY}:
        raise FormatError(f"adapter_model.safetensors holds {', '.join(sorted(tensors))}; {KEY} alone is expected")
    if keys.get("num_transformer_submodules") not in (None, 1):
        raise FormatError("adapter_config.json: num_transformer_submodules is not 1, which cannot be read yet")
    rows = tensors[KEY]
    size = cached(skeleton)
    width = 2 * size.layers * size.kv_heads * size.head_dim
    if rows.ndim != 2 or rows.shape[1] != width:
        raise FormatError(
            f"adapter_model.safetensors: {KEY} is {tuple(rows.shape)}, but the keys and values of "
            f"{skeleton.architecture} are {width} wide"
        )
    return {"name": "prefix", "num_virtual_tokens": len(rows)}, {"prompt": rows}


EXCHANGE = Exchange("PREFIX_TUNING", write, read)
