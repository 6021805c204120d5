"""P-tuning of the `peft` package: the embeddings alone, so that what made them is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftctl.methods._prompts import KEY, embedded, peft_keys, peft_rows
from peftctl.methods.base import Exchange
from peftctl.methods.p_tuning import PTuningConfig
from peftctl.skeleton import Skeleton


def write(
    config: PTuningConfig, skeleton: Skeleton, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    import torch

    from peftctl.methods.p_tuning.delta import Encoded

    width = embedded(skeleton)
    keys = peft_keys("P_TUNING", skeleton, config.num_virtual_tokens, width, skeleton.dimensions.heads)
    keys |= {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": width}  # not looked at once it is made
    encoder = Encoded(config, width).eval()
    encoder.load_state_dict(dict(tensors))
    with torch.no_grad():  # as in evaluation: an LSTM's last bits are others where gradients are kept
        return keys, {KEY: encoder.rows()}


def read(
    keys: Mapping[str, Any], skeleton: Skeleton, tensors: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    rows = peft_rows(keys, tensors, embedded(skeleton), f"the embeddings of {skeleton.architecture}")
    return {"name": "p-tuning", "num_virtual_tokens": len(rows), "encoder": "none"}, {"embedding": rows}


EXCHANGE = Exchange("P_TUNING", write, read)
