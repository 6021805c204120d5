"""LoRA's own: targets, scale, counts by the paper's formula, and the `peft` package as the oracle of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from peftctl.errors import FormatError, TargetError
from peftctl.methods.lora import METHOD, LoraConfig
from peftctl.methods.lora.peft import EXCHANGE
from peftctl.surgery import skeleton
from tests.methods import contract
from tests.methods.exchange import ours, read, saved_by_peft, theirs, written
from tests.models import tiny


def lora(**keys: Any) -> LoraConfig:
    return LoraConfig(name="lora", **({"rank": 4} | keys))


VARIANTS = {
    "names": lora(target_modules=["q_proj", "v_proj"], alpha=12.0),
    "one name": lora(target_modules=["q_proj"], rank=1),
    "regex": lora(target_modules=r".*\.mlp\..*"),
    "one layer": lora(layers=[1]),
    "stabilised": lora(rank_stabilized=True, alpha=8.0),
    "embedding": lora(target_modules=["embed_tokens", "q_proj"]),
    "dropout": lora(dropout=0.3),
    "head": lora(target_modules=["lm_head"]),
    "patterns": lora(rank_pattern={"k_proj": 2, r"layers\.1\.mlp\..*": 6}, alpha_pattern={"self_attn.q_proj": 3.0}),
    "patterns, stabilised": lora(rank_pattern={"k_proj": 2, "model.layers.0.mlp.up_proj": 9}, rank_stabilized=True),
    "frozen a": lora(train_a=False),
    "ratio": lora(lr_ratio=16.0),
}
CONV1D = {
    "qkv": lora(target_modules=["c_attn"]),
    "everything": lora(),
    "embedding": lora(target_modules=["wpe"]),
    "biases of the chosen": lora(target_modules=["c_attn", "c_proj"], bias="lora_only"),
    "all biases": lora(target_modules=["c_attn"], bias="all"),
}
# what peft has no form for: written as plain products of a larger rank
RESTATED = [
    ("llama", lora(init="pissa")),
    ("llama", lora(init="pissa", rank_stabilized=True, dropout=0.3, rank_pattern={"q_proj": 7})),
    ("llama", lora(init="orthogonal", train_a=False)),
    ("gpt2", lora(init="pissa", rank=3)),
    ("gpt2", lora(target_modules=["c_attn.q"])),
    ("gpt2", lora(target_modules=["c_attn.q", "c_attn.v"])),
    ("gpt2", lora(target_modules=["c_attn.v", "c_fc"], rank_stabilized=True, bias="all")),
    ("gpt2", lora(target_modules=["attn.c_attn.q", "attn.c_attn.v", "mlp.c_proj"], init="pissa", alpha=3.0)),
    ("gpt2", lora(target_modules=["c_attn.k"], train_a=False, layers=[1])),
    ("gpt_neox", lora(target_modules=["query_key_value.q", "query_key_value.v"], init="orthogonal")),
    ("falcon", lora(target_modules=["query_key_value.q", "query_key_value.v"])),
    ("phi3", lora(target_modules=["qkv_proj.q", "qkv_proj.k", "qkv_proj.v"])),
    ("bloom", lora(target_modules=["query_key_value.k"], dropout=0.3)),
    ("mpt", lora(target_modules=["Wqkv.v", "out_proj"])),
]


@pytest.mark.parametrize("check", contract.FULL, ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_keep_the_contract(variant: str, check: Any) -> None:
    check(VARIANTS[variant], "llama")


@pytest.mark.parametrize("check", contract.FULL, ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", CONV1D)
def test_variants_keep_the_contract_on_conv1d(variant: str, check: Any) -> None:
    check(CONV1D[variant], "gpt2")


@pytest.mark.parametrize("check", contract.FULL, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("name", "config"), RESTATED, ids=str)
def test_what_peft_lacks_keeps_the_contract(name: str, config: LoraConfig, check: Any) -> None:
    check(config, name)


@pytest.mark.parametrize("name", ["gemma", "gemma3"])
def test_a_scaled_embedding_folds(name: str) -> None:
    contract.folds_or_refuses(lora(target_modules=["embed_tokens"]), name)


def test_counts_by_the_papers_formula() -> None:
    table = skeleton(tiny("llama"))  # hidden 32, 4 heads of 8, 2 key-value heads, MLP 64, 2 layers
    assert METHOD.count(table, lora(target_modules=["q_proj"])).total == 2 * 4 * (32 + 32)
    assert METHOD.count(table, lora(target_modules=["q_proj", "v_proj"])).total == 2 * 4 * ((32 + 32) + (32 + 16))
    attention, mlp = (32 + 32) * 2 + (32 + 16) * 2, 3 * (32 + 64)
    assert METHOD.count(table, lora()).total == 2 * 4 * (attention + mlp)
    assert METHOD.count(table, lora(target_modules=["embed_tokens"])).total == 4 * (128 + 32)
    assert METHOD.count(table, lora(layers=[0])).total == 4 * (attention + mlp)
    # fused: 4 r d, as for query and value apart
    assert METHOD.count(skeleton(tiny("gpt2")), lora(target_modules=["c_attn"])).total == 2 * 4 * (32 + 96)


def test_says_what_it_matched() -> None:
    table = skeleton(tiny("llama"))
    assert METHOD.count(table, lora(target_modules=["q_proj"])).summary == "2 modules in 2 of 2 layers: q_proj"
    assert not any("lm_head" in path for path in METHOD.count(table, lora()).places)


def test_the_scale() -> None:
    assert lora(rank=4).scale == 2.0
    assert lora(rank=4, alpha=4.0).scale == 1.0
    assert lora(rank=4, alpha=4.0, rank_stabilized=True).scale == 2.0


def test_dropout_is_for_training_alone() -> None:
    model, attachment = contract.attached(lora(dropout=0.5), "llama")
    contract.disturb(attachment)
    steady = contract.answer(model, attachment)
    attachment.train()
    assert not torch.equal(contract.answer(model, attachment), contract.answer(model, attachment))
    attachment.eval()
    assert torch.equal(contract.answer(model, attachment), steady)


def test_a_bf16_base_runs_in_bf16() -> None:
    model, attachment = contract.attached(lora(target_modules=["q_proj", "embed_tokens"]), "llama")
    contract.disturb(attachment)
    model.bfloat16()
    assert all(t.dtype == torch.float32 for t in attachment.tensors().values())
    assert contract.answer(model, attachment).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "keys", "says"),
    [
        ("llama", {"rank": 17}, "method.rank: 17 is above 16, the smaller side of model.layers.0.self_attn.k_proj"),
        ("llama", {"target_modules": ["q_prj"]}, "did you mean q_proj"),
        ("llama", {"target_modules": ["mlp"]}, "LlamaMLP, which this method cannot adapt"),
        ("llama", {"target_modules": "q_proj"}, "a single name goes in a list"),
        ("llama", {"layers": [2]}, "2 is not a layer"),
        ("opt", {"target_modules": ["embed_positions"]}, "OPTLearnedPositionalEmbedding, which lora cannot adapt"),
    ],
)
def test_refuses_targets_with_a_reason(name: str, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(TargetError, match=says):
        METHOD.count(skeleton(tiny(name)), lora(**keys))


@pytest.mark.parametrize(
    "keys", [{"rank": 0}, {"rank": True}, {"dropout": 1.0}, {"alpha": float("inf")}, {"target_modules": []}, {"r": 8}]
)
def test_refuses_impossible_numbers(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        lora(**keys)


EXCHANGED = [
    *[("llama", lora(**c.model_dump(exclude={"name", "init_from"}))) for c in VARIANTS.values()],
    *[("gpt2", c) for c in CONV1D.values()],
    ("gpt2", lora(target_modules=["wte"])),  # tied: not trained here, but what others trained is served
    ("qwen3", lora()),
    ("gemma3", lora(target_modules=["embed_tokens", "k_proj"])),
    ("phi3", lora()),
]


@pytest.mark.filterwarnings("ignore")  # peft's own remarks on tied weights
@pytest.mark.parametrize(("name", "config"), [*EXCHANGED, *RESTATED], ids=str)
def test_peft_computes_the_same_from_our_files(name: str, config: LoraConfig, tmp_path: Path) -> None:
    _, ours = written(tmp_path, config, name)
    torch.testing.assert_close(theirs(tmp_path, name), ours, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("name", "config"), EXCHANGED, ids=str)
def test_our_files_come_back_bit_for_bit(name: str, config: LoraConfig, tmp_path: Path) -> None:
    _, expected = written(tmp_path, config, name)
    assert torch.equal(ours(tmp_path, "lora", name), expected)


@pytest.mark.parametrize(("name", "config"), RESTATED, ids=str)
def test_what_was_restated_comes_back_as_a_plain_product(name: str, config: LoraConfig, tmp_path: Path) -> None:
    _, expected = written(tmp_path, config, name)
    found, _ = read(tmp_path, "lora", name)
    assert isinstance(found, LoraConfig) and found.init == "default"
    torch.testing.assert_close(ours(tmp_path, "lora", name), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 12}),
        ("llama", {"target_modules": "all-linear", "use_rslora": True}),
        ("llama", {"target_modules": r".*mlp\.up_proj", "layers_to_transform": None}),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
        ("llama", {"target_modules": ["embed_tokens"]}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
        ("llama", {"target_modules": "all-linear", "rank_pattern": {"k_proj": 2, ".*mlp.*": 7, "gone": 3}}),
        ("llama", {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {"layers.1.self_attn.q_proj": 5}}),
    ],
)
def test_pefts_files_compute_the_same_here(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    expected = saved_by_peft(tmp_path, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **keys), name)
    torch.testing.assert_close(ours(tmp_path, "lora", name), expected, rtol=1e-5, atol=2e-5)


def test_writes_only_long_standing_keys(tmp_path: Path) -> None:
    written(tmp_path, lora(), "llama")
    keys = set(json.loads((tmp_path / "adapter_config.json").read_text()))
    assert keys == {
        *("peft_type", "task_type", "inference_mode", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout"),
        *("target_modules", "bias", "fan_in_fan_out", "modules_to_save", "use_rslora", "init_lora_weights"),
    }
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert len(names) == 2 * 14


@pytest.mark.parametrize(
    "keys",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"lora_bias": True}],
)
def test_refuses_what_it_cannot_read(keys: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=next(iter(keys))):
        EXCHANGE.read({"peft_type": "LORA", "r": 4} | keys, skeleton(tiny("llama")), {})


@pytest.mark.parametrize(
    "name", ["base_model.model.lm_head.weight", "base_model.model.model.layers.9.q_proj.lora_A.weight"]
)
def test_refuses_tensors_that_it_does_not_know(name: str) -> None:
    with pytest.raises(FormatError, match=name):
        EXCHANGE.read({"r": 4}, skeleton(tiny("llama")), {name: torch.zeros(1)})


def test_an_embedding_with_a_scale_is_attached_without_its_weights() -> None:
    with torch.device("meta"):
        model = type(tiny("gemma3"))(tiny("gemma3").config)
        attachment = METHOD.attach(model, lora(target_modules=["embed_tokens"], rank=2))
    assert [tuple(tensor.shape) for tensor in attachment.tensors().values()] == [(2, 128), (32, 2)]
