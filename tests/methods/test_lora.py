"""LoRA's own: targets, scale, counts by the paper's formula, and the `peft` package as the oracle of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from peftctl.errors import FormatError, TargetError
from peftctl.methods.lora import METHOD, LoraConfig
from peftctl.methods.lora.peft import EXCHANGE
from peftctl.skeleton import Skeleton
from peftctl.surgery import skeleton
from tests.methods import contract
from tests.models import logits, tiny


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
}
CONV1D = {
    "qkv": lora(target_modules=["c_attn"]),
    "everything": lora(),
    "embedding": lora(target_modules=["wte", "wpe"]),
}


@pytest.mark.parametrize("check", contract.FULL, ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_keep_the_contract(variant: str, check: Any) -> None:
    check(VARIANTS[variant], "llama")


@pytest.mark.parametrize("check", contract.FULL, ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", CONV1D)
def test_variants_keep_the_contract_on_conv1d(variant: str, check: Any) -> None:
    check(CONV1D[variant], "gpt2")


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


def written(folder: Path, config: LoraConfig, name: str) -> tuple[Skeleton, torch.Tensor]:
    """Write a disturbed adapter as peft has it; the skeleton and our logits."""
    model, attachment = contract.attached(config, name)
    contract.disturb(attachment)
    table = skeleton(model)
    keys, tensors = EXCHANGE.write(config, table, attachment.tensors())
    (folder / "adapter_config.json").write_text(json.dumps(keys | {"base_model_name_or_path": "tiny"}))
    save_file({k: t.detach().contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    return table, contract.answer(model, attachment)


EXCHANGED = [
    *[("llama", lora(**c.model_dump(exclude={"name", "init_from"}))) for c in VARIANTS.values()],
    *[("gpt2", c) for c in CONV1D.values()],
    ("qwen3", lora()),
    ("gemma3", lora(target_modules=["embed_tokens", "k_proj"])),
    ("phi3", lora()),
]


@pytest.mark.filterwarnings("ignore")  # peft's own remarks on tied weights
@pytest.mark.parametrize(("name", "config"), EXCHANGED, ids=str)
def test_peft_computes_the_same_from_our_files(name: str, config: LoraConfig, tmp_path: Path) -> None:
    _, ours = written(tmp_path, config, name)
    model = peft.PeftModel.from_pretrained(tiny(name), tmp_path)
    torch.testing.assert_close(logits(model), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "config"), EXCHANGED, ids=str)
def test_our_files_come_back_bit_for_bit(name: str, config: LoraConfig, tmp_path: Path) -> None:
    table, ours = written(tmp_path, config, name)
    keys = json.loads((tmp_path / "adapter_config.json").read_text())
    block, tensors = EXCHANGE.read(keys, table, load_file(tmp_path / "adapter_model.safetensors"))
    model, attachment = contract.attached(LoraConfig(**block), name)
    attachment.load(tensors)
    assert torch.equal(contract.answer(model, attachment), ours)


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
    ],
)
def test_pefts_files_compute_the_same_here(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(tiny(name), peft.LoraConfig(task_type="CAUSAL_LM", r=4, **keys)).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    wrapped.save_pretrained(tmp_path)
    block, tensors = EXCHANGE.read(
        json.loads((tmp_path / "adapter_config.json").read_text()),
        skeleton(tiny(name)),
        load_file(tmp_path / "adapter_model.safetensors"),
    )
    model, attachment = contract.attached(LoraConfig(**block), name)
    attachment.load(tensors)
    torch.testing.assert_close(contract.answer(model, attachment), logits(wrapped), rtol=1e-5, atol=1e-5)


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
    [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"rank_pattern": {"q": 8}}],
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
