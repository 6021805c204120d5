"""The bottleneck's own: its places against forwards written out by hand, counts by the formula, refusals by name.

The same places were compared once with the `adapters` package 1.3.0 on Llama, Mistral, GPT-2, BERT and RoBERTa.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftctl.errors import TargetError
from peftctl.methods.bottleneck import METHOD, PRESETS, BottleneckConfig
from peftctl.methods.bottleneck.delta import ACTIVATIONS
from peftctl.surgery import skeleton
from tests.methods import contract
from tests.models import logits, tiny

Tensors = dict[str, Tensor]


def bottleneck(**keys: Any) -> BottleneckConfig:
    return BottleneckConfig(name="bottleneck", **keys)


@pytest.mark.parametrize("check", contract.FULL, ids=lambda check: check.__name__)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_presets_keep_the_contract(name: str, preset: str, check: Any) -> None:
    check(bottleneck(preset=preset, reduction_factor=4.0), name)


@pytest.mark.parametrize("check", contract.CORE, ids=lambda check: check.__name__)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["opt", "gpt_neox", "qwen3", "gemma", "gemma2", "mistral", "phi3", "falcon", "mpt"])
def test_presets_keep_the_core(name: str, preset: str, check: Any) -> None:
    check(bottleneck(preset=preset), name)


def small(tensors: Tensors, path: str, activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A(h), written out."""
    w1, b1, w2, b2 = (tensors[f"{path}.{n}"] for n in ("down.weight", "down.bias", "up.weight", "up.bias"))
    return lambda h: activation(h @ w1.T + b1) @ w2.T + b2


def by_hand(model: PreTrainedModel, preset: str, tensors: Tensors) -> None:
    """Rewrite the blocks of a Llama, GPT-2 or BERT so that they hold the preset as its paper draws it."""
    activation = nn.functional.silu if preset == "houlsby" else nn.functional.relu
    kind = model.config.model_type
    stack = {"llama": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer"}[kind]
    for index, block in enumerate(model.get_submodule(stack)):
        path = f"{stack}.{index}"

        def a(end: str, path: str = path) -> Callable[[Tensor], Tensor]:
            return small(tensors, f"{path}.{end}" if end else path, activation)

        {"llama": _llama, "gpt2": _gpt2, "bert": _bert}[kind](block, preset, a)


def _llama(block: Any, preset: str, a: Callable[..., Any]) -> None:
    def forward(h: Tensor, **kwargs: Any) -> Tensor:
        attended = block.self_attn(hidden_states=block.input_layernorm(h), **kwargs)[0]
        if preset == "houlsby":
            attended = attended + a("self_attn.o_proj")(attended)
        middle = h + attended
        out = block.mlp(block.post_attention_layernorm(middle))
        if preset == "houlsby":
            out = out + a("mlp.down_proj")(out)
        if preset == "parallel":
            out = out + 4 * a("mlp.down_proj")(middle)
        out = middle + out
        return out + a("")(out) if preset == "pfeiffer" else out

    block.forward = forward


def _gpt2(block: Any, preset: str, a: Callable[..., Any]) -> None:
    def forward(h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attended = block.attn(block.ln_1(h), **{k: kwargs[k] for k in ("attention_mask",) if k in kwargs})[0]
        if preset == "houlsby":
            attended = attended + a("attn.c_proj")(attended)
        middle = h + attended
        out = block.mlp(block.ln_2(middle))
        if preset == "houlsby":
            out = out + a("mlp.c_proj")(out)
        if preset == "parallel":
            out = out + 4 * a("mlp.c_proj")(middle)
        out = middle + out
        return out + a("")(out) if preset == "pfeiffer" else out

    block.forward = forward


def _bert(block: Any, preset: str, a: Callable[..., Any]) -> None:
    first, second = block.attention.output, block.output

    def after_attention(h: Tensor, residual: Tensor) -> Tensor:
        h = first.dense(h)
        if preset == "houlsby":
            h = h + a("attention.output.dense")(h)
        return first.LayerNorm(h + residual)

    def after_mlp(h: Tensor, residual: Tensor) -> Tensor:
        h = second.dense(h)
        if preset == "houlsby":
            h = h + a("output.dense")(h)
        if preset == "parallel":
            h = h + 4 * a("output.dense")(residual)
        if preset == "pfeiffer":
            h = h + a("output.LayerNorm")(second.LayerNorm(h + residual))
        return second.LayerNorm(h + residual)

    first.forward, second.forward = after_attention, after_mlp


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_sits_where_the_papers_and_adapter_hub_put_it(name: str, preset: str) -> None:
    model, attachment = contract.attached(bottleneck(preset=preset, width=8), name)
    contract.disturb(attachment)
    other = tiny(name)
    by_hand(other, preset, {key: tensor.detach() for key, tensor in attachment.tensors().items()})
    torch.testing.assert_close(contract.answer(model, attachment), logits(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["houlsby", "pfeiffer"])
def test_starts_near_the_identity(preset: str) -> None:
    model, attachment = contract.attached(bottleneck(preset=preset), "llama")
    torch.testing.assert_close(contract.answer(model, attachment), logits(tiny("llama")), rtol=0, atol=0.1)


def test_counts_by_the_papers_formula() -> None:
    hidden, layers = 32, 2
    for preset, each, width in (("houlsby", 2, 2), ("pfeiffer", 1, 2), ("parallel", 1, 16)):
        counted = METHOD.count(skeleton(tiny("llama")), bottleneck(preset=preset))
        assert counted.total == each * layers * (2 * hidden * width + width + hidden)
        assert f"{each * layers} bottlenecks of width {width} in 2 of 2 layers" in counted.summary


def test_the_width() -> None:
    assert bottleneck(reduction_factor=4.0).width_in(100) == 25
    assert bottleneck(width=7).width_in(100) == 7
    assert bottleneck(reduction_factor=1000).width_in(100) == 1
    assert bottleneck(preset="parallel").width_in(100) == 50


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_trains(activation: Any) -> None:
    contract.trains_exactly_its_own(bottleneck(activation=activation, preset="houlsby"), "llama")


def test_a_norm_that_ends_a_block_comes_last_in_post_norm_opt() -> None:
    """OPT-350m normalises after each residual: the same classes as its siblings, other places."""
    model = tiny("opt")
    config = model.config
    config.do_layer_norm_before = False
    torch.manual_seed(0)
    places = METHOD.count(skeleton(type(model)(config)), bottleneck()).places
    assert list(places) == [f"model.decoder.layers.{i}.final_layer_norm" for i in range(2)]
    assert list(METHOD.count(skeleton(model), bottleneck()).places) == [f"model.decoder.layers.{i}" for i in range(2)]


@pytest.mark.parametrize(
    ("name", "preset", "says"),
    [
        (
            "mixtral",
            "houlsby",
            "MixtralForCausalLM has no place for it: model.layers.0 has no single output projection",
        ),
        ("mixtral", "parallel", "MixtralForCausalLM has no place for it"),
    ],
)
def test_refuses_an_architecture_without_the_place_by_name(name: str, preset: str, says: str) -> None:
    with pytest.raises(TargetError, match=says):
        METHOD.count(skeleton(tiny(name)), bottleneck(preset=preset))


@pytest.mark.parametrize(
    "keys", [{"width": 4, "reduction_factor": 2.0}, {"preset": "pfeifer"}, {"width": 0}, {"activation": "x"}]
)
def test_refuses_impossible_blocks(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        bottleneck(**keys)
