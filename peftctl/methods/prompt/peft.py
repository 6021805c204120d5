"""Prompts of the `peft` package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftctl.methods._prompts import KEY, embedded, peft_keys, peft_rows
from peftctl.methods.base import Exchange
from peftctl.methods.prompt import PromptConfig
from peftctl.skeleton import Skeleton


def write(
    config: PromptConfig, skeleton: Skeleton, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    rows = tensors["prompt"]
    keys = peft_keys("PROMPT_TUNING", skeleton, len(rows), rows.shape[1], skeleton.dimensions.heads)
    return keys | {"prompt_tuning_init": "RANDOM"}, {KEY: rows}


def read(
    keys: Mapping[str, Any], skeleton: Skeleton, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    rows = peft_rows(keys, tensors, embedded(skeleton), f"the embeddings of {skeleton.architecture}")
    return {"name": "prompt", "num_virtual_tokens": len(rows)}, {"prompt": rows}


EXCHANGE = Exchange("PROMPT_TUNING", write, read)
