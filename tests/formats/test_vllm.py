"""vLLM's rules on files in peft's form: what it serves as it was trained passes, everything else is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peftctl import methods
from peftctl.formats import peft, vllm
from peftctl.surgery import skeleton
from tests.methods import contract


def judged(model: str = "llama", **keys: Any) -> tuple[list[str], list[str]]:
    """Problems and notes of an adapter on a tiny model."""
    config = contract.config(**keys)
    base, attachment = contract.attached(config, model)
    tensors = attachment.tensors() | ({"model.norm.weight": torch.ones(32)} if config.save_modules else {})
    written, stored = peft.as_peft(methods.get(config.name), config, skeleton(base), tensors)
    found = vllm.problems(written, stored)
    return found, [] if found else vllm.notes(written)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma", "phi3"])
def test_low_rank_products_alone_are_served(name: str) -> None:
    assert judged(name, name="lora", rank=8) == ([], [])
    assert judged(name, name="lora", rank=16, rank_stabilized=True) == ([], [])


def test_a_rank_above_the_default_is_said_with_the_least_bound() -> None:
    assert judged(name="lora", rank=17, target_modules=["q_proj"]) == (
        [],
        ["start vLLM with --max-lora-rank 32: the rank is 17"],
    )
    assert vllm.notes({"r": 32}) == ["start vLLM with --max-lora-rank 32: the rank is 32"]


def test_what_is_written_as_a_larger_rank_counts_as_that() -> None:
    assert judged(name="lora", rank=10, init="pissa", target_modules=["q_proj"])[1] == [
        "start vLLM with --max-lora-rank 32: the rank is 20"
    ]


@pytest.mark.parametrize(
    ("model", "keys", "says"),
    [
        ("llama", {"name": "dora"}, "it has no DoRA"),
        ("llama", {"name": "ia3"}, "it serves LoRA alone, not IA3"),
        ("llama", {"name": "prefix", "num_virtual_tokens": 2}, "it serves LoRA alone, not PREFIX_TUNING"),
        ("llama", {"name": "lora", "save_modules": ["norm"]}, "it refuses saved modules"),
        ("opt", {"name": "lora", "bias": "lora_only"}, "it refuses biases"),
        ("llama", {"name": "lora", "alpha": 8.0, "rank_pattern": {"q_proj": 4}}, "whatever the patterns say"),
        ("llama", {"name": "lora", "alpha": 8.0, "alpha_pattern": {"q_proj": 4.0}}, "whatever the patterns say"),
        (
            "mixtral",
            {"name": "lora", "target_modules": ["gate_up_proj", "q_proj"]},
            "it has no products of experts in this form",
        ),
        ("gpt2", {"name": "lora"}, "it knows no module c_attn, c_fc, c_proj"),
    ],
)
def test_what_it_does_not_serve_is_named(model: str, keys: dict[str, Any], says: str) -> None:
    (found,), _ = judged(model, **keys)
    assert found.endswith(says)


def test_a_rank_above_every_bound_is_named() -> None:
    keys = {"peft_type": "LORA", "r": 600}
    assert vllm.problems(keys, []) == ["its largest rank is 512, not 600"]
