"""The prefix's own: its layout, counts by the formula, and the `peft` package as the oracle of its files."""

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
from peftctl.methods.prefix import METHOD, PrefixConfig
from peftctl.methods.prefix.peft import EXCHANGE
from peftctl.surgery import skeleton
from tests.methods import contract
from tests.models import inputs, logits, tiny


def prefix(**keys: Any) -> PrefixConfig:
    return PrefixConfig(name="prefix", **({"num_virtual_tokens": 5} | keys))


VARIANTS = {
    "one token": prefix(num_virtual_tokens=1),
    "reparametrised": prefix(reparametrise=True),
    "reparametrised wide": prefix(reparametrise=True, hidden_size=24),
}
DECODERS = ("llama", "gpt2", "opt", "gpt_neox", "qwen3", "gemma", "phi3")


@pytest.mark.parametrize("check", contract.FULL, ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_variants_keep_the_contract(name: str, variant: str, check: Any) -> None:
    check(VARIANTS[variant], name)


def test_counts_by_the_papers_formula() -> None:
    layers, width, middle = 2, 2 * 8, 24  # grouped: 2 key-value heads of 8, not 4
    table = skeleton(tiny("llama"))
    assert METHOD.count(table, prefix()).total == 2 * layers * width * 5
    made = 5 * width + (width * middle + middle) + (middle * 2 * layers * width + 2 * layers * width)
    assert METHOD.count(table, prefix(reparametrise=True, hidden_size=middle)).total == made
    assert METHOD.count(skeleton(tiny("gpt2")), prefix()).total == 2 * layers * 32 * 5


def test_lays_out_keys_and_values_as_a_cache_holds_them() -> None:
    _, attachment = contract.attached(prefix(), "llama")
    rows = attachment.tensors()["prompt"]  # (tokens, 2 * layers * heads * width)
    virtual = attachment.virtual()
    assert virtual is not None and virtual.length == 5
    assert [tuple(k.shape) for k in virtual.keys] == [(2, 5, 8)] * 2
    for layer in range(2):
        for token in range(5):
            row = rows[token].view(4, 2, 8)
            assert torch.equal(virtual.keys[layer][:, token], row[2 * layer])
            assert torch.equal(virtual.values[layer][:, token], row[2 * layer + 1])


def test_is_silent_while_disabled() -> None:
    _, attachment = contract.attached(prefix(), "llama")
    with attachment.disabled():
        assert attachment.virtual() is None
    assert attachment.virtual() is not None


def test_serves_a_bf16_base_in_bf16() -> None:
    model = tiny("llama").bfloat16()
    virtual = METHOD.attach(model, prefix()).virtual()
    assert virtual is not None and {t.dtype for t in (*virtual.keys, *virtual.values)} == {torch.bfloat16}


@pytest.mark.parametrize("keys", [{"num_virtual_tokens": 0}, {"hidden_size": 8}, {"num_virtual_tokens": "5"}])
def test_refuses_impossible_numbers(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        prefix(**keys)


def test_refuses_keys_of_several_shapes_by_name() -> None:
    table = skeleton(tiny("llama"))
    odd = [
        m._replace(shapes={"weight": (8, 32)}) if m.path.endswith("1.self_attn.k_proj") else m for m in table.modules
    ]
    with pytest.raises(TargetError, match="LlamaForCausalLM does not have keys and values of one shape"):
        METHOD.count(table._replace(modules=tuple(odd)), prefix())


def written(folder: Path, config: PrefixConfig, name: str) -> tuple[Any, torch.Tensor]:
    model, attachment = contract.attached(config, name)
    table = skeleton(model)
    keys, tensors = EXCHANGE.write(config, table, attachment.tensors())
    (folder / "adapter_config.json").write_text(json.dumps(keys | {"base_model_name_or_path": "tiny"}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return table, contract.answer(model, attachment)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [prefix(), *VARIANTS.values()], ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_peft_computes_the_same_from_our_files(name: str, config: PrefixConfig, tmp_path: Path) -> None:
    _, ours = written(tmp_path, config, name)
    model = peft.PeftModel.from_pretrained(tiny(name), tmp_path)
    ids = inputs(model)["input_ids"]
    theirs = logits(model, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [prefix(), *VARIANTS.values()], ids=str)
def test_our_files_come_back(config: PrefixConfig, tmp_path: Path) -> None:
    table, ours = written(tmp_path, config, "llama")
    keys = json.loads((tmp_path / "adapter_config.json").read_text())
    assert keys["prefix_projection"] is False
    block, tensors = EXCHANGE.read(keys, table, load_file(tmp_path / "adapter_model.safetensors"))
    model, attachment = contract.attached(PrefixConfig(**block), "llama")
    attachment.load(tensors)
    assert torch.equal(contract.answer(model, attachment), ours)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pefts_files_compute_the_same_here(name: str, projected: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=projected)
    wrapped = peft.get_peft_model(tiny(name), theirs).eval()
    wrapped.save_pretrained(tmp_path)
    block, tensors = EXCHANGE.read(
        json.loads((tmp_path / "adapter_config.json").read_text()),
        skeleton(tiny(name)),
        load_file(tmp_path / "adapter_model.safetensors"),
    )
    model, attachment = contract.attached(PrefixConfig(**block), name)
    attachment.load(tensors)
    ids = inputs(model)["input_ids"]
    expected = logits(wrapped, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(contract.answer(model, attachment), expected, rtol=1e-5, atol=1e-5)


def test_refuses_a_prefix_for_another_base() -> None:
    with pytest.raises(FormatError, match="64 wide"):
        EXCHANGE.read({}, skeleton(tiny("llama")), {"prompt_embeddings": torch.zeros(5, 32)})
    with pytest.raises(FormatError, match="prompt_embeddings alone"):
        EXCHANGE.read({}, skeleton(tiny("llama")), {"other": torch.zeros(5, 64)})
