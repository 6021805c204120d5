"""Prefixes of the `peft` package: the keys and values alone, so that what made them is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftctl.methods._prompts import KEY, peft_keys, peft_rows
from peftctl.methods.base import Exchange
from peftctl.methods.prefix import PrefixConfig, cached
from peftctl.skeleton import Skeleton


def write(
    config: PrefixConfig, skeleton: Skeleton, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    from peftctl.methods.prefix.delta import project

    size = cached(skeleton)
    width = size.kv_heads * size.head_dim
    keys = peft_keys("PREFIX_TUNING", skeleton, config.num_virtual_tokens, width, size.kv_heads)
    # what is written is already projected
    keys |= {"encoder_hidden_size": width, "prefix_projection": False}
    return keys, {KEY: project({name: tensor.detach() for name, tensor in tensors.items()}).contiguous()}


def read(
    keys: Mapping[str, Any], skeleton: Skeleton, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    size = cached(skeleton)
    width = 2 * size.layers * size.kv_heads * size.head_dim
    rows = peft_rows(keys, tensors, width, f"the keys and values of {skeleton.architecture}")
    return {"name": "prefix", "num_virtual_tokens": len(rows)}, {"prompt": rows}


# of an encoder-decoder, peft has prefixes in the decoder's attention to itself alone, the same in several layers
EXCHANGE = Exchange("PREFIX_TUNING", write, read, holds=lambda skeleton: not skeleton.dimensions.encoder_layers)
