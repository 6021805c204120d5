"""`save_modules`: any method with modules that are trained and saved whole beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from peftctl import methods
from peftctl.adapter import attach
from peftctl.base import resolve
from peftctl.batch import build
from peftctl.counting import count
from peftctl.errors import TargetError
from peftctl.formats.peft import read, write
from peftctl.merging import merge
from peftctl.methods.attachment import Attachment
from peftctl.opened import find, policy_of
from peftctl.opened import open as load
from peftctl.skeleton import dotted
from peftctl.surgery import frozen, skeleton
from tests.models import logits, tiny
from tests.test_fuse import batch

# a head of its own (Llama), one tied to the embeddings (GPT-2), a norm, and a block's whole MLP
PLACES = [("llama", ["lm_head"]), ("gpt2", ["lm_head"]), ("gpt2", ["wte"]), ("llama", ["norm", "layers.1.mlp"])]
BLOCKS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "target_modules": "all-linear"},
    "prefix": {"num_virtual_tokens": 3},
    "bitfit": {"add_missing": True},
}


def config(method: str, modules: list[str]) -> Any:
    keys = dict(BLOCKS[method])
    if method == "lora":
        keys["layers"] = [0]
    if method == "bitfit":
        keys["biases"] = "query+mlp"
    return methods.get(method).config(name=method, save_modules=modules, **keys)


def attached(name: str, modules: list[str], method: str = "lora", moved: bool = True) -> tuple[Any, Attachment, Any]:
    model, chosen = frozen(tiny(name)).eval(), config(method, modules)
    attachment = attach(model, methods.get(method), chosen, 0).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in attachment.trainable().values() if moved else ():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model, attachment, chosen


@pytest.mark.parametrize(("name", "modules"), PLACES)
def test_starts_as_the_base_and_is_switched_off_bit_for_bit(name: str, modules: list[str]) -> None:
    expected = logits(tiny(name))
    model, _, _ = attached(name, modules, moved=False)
    assert torch.equal(logits(model), expected)
    model, attachment, _ = attached(name, modules)
    assert not torch.equal(logits(model), expected)
    with attachment.disabled():
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(("name", "modules"), PLACES)
def test_saved_modules_are_trained_with_fused_kernels_as_without(name: str, modules: list[str]) -> None:
    found = []
    for fused in (False, True):
        model, attachment, _ = attached(name, modules)
        policy = policy_of(model, attachment, skeleton(model).dimensions.layers)
        if fused:
            policy.fuse(pack=False)
        logprob = policy.tokens(batch()).logprob
        found.append(torch.autograd.grad(logprob.sum(), list(attachment.trainable().values())))
    names = list(attachment.trainable())
    assert any(dotted("", modules[0]) in n or modules[0] in n or "wte" in n for n in names)
    for ours, theirs in zip(*found, strict=True):
        assert theirs.abs().sum() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize(("name", "modules"), PLACES)
def test_counts_are_those_of_what_is_built(name: str, modules: list[str], tmp_path: Path) -> None:
    tiny(name).save_pretrained(tmp_path)
    _, attachment, chosen = attached(name, modules)
    counts = count(resolve(str(tmp_path)), methods.get("lora"), chosen)
    sizes = {n: p.numel() for n, p in attachment.trainable().items()}
    own = sum(size for n, size in sizes.items() if n.endswith((".a", ".b")))
    assert (counts.adapter, counts.saved_modules) == (own, sum(sizes.values()) - own)
    assert counts.trainable == sum(counts.places.values()) == sum(sizes.values())


@pytest.mark.filterwarnings("ignore")  # peft's own remarks
@pytest.mark.parametrize("method", ["lora", "prefix"])
@pytest.mark.parametrize(("name", "modules"), [("llama", ["lm_head"]), ("llama", ["norm"])])
def test_peft_computes_the_same_from_our_files(name: str, modules: list[str], method: str, tmp_path: Path) -> None:
    tiny(name).save_pretrained(tmp_path / "base")
    model, attachment, chosen = attached(name, modules, method)
    policy = policy_of(model, attachment, 2)
    base = resolve(str(tmp_path / "base"))
    (tmp_path / "adapter").mkdir()
    write(tmp_path / "adapter", methods.get(method), chosen, skeleton(model), attachment.tensors(), base)
    theirs = peft.PeftModel.from_pretrained(tiny(name), tmp_path / "adapter").eval()
    ids = torch.tensor([row.ids for row in batch().rows[2:]])
    expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.log_softmax(-1)
    alone = batch().rows[2]
    found = policy.tokens(build([alone])).logprob
    targets = torch.tensor(alone.ids)[1:]
    chosen_logprob = expected[0, :-1].gather(1, targets[:, None])[:, 0][1:]
    torch.testing.assert_close(found, chosen_logprob, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_pefts_own_files_are_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(
        tiny("llama"),
        peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
    ).eval()
    with torch.no_grad():
        wrapped.base_model.model.lm_head.modules_to_save.default.weight.add_(0.1)
    wrapped.save_pretrained(tmp_path)
    adapter = read(tmp_path, skeleton(tiny("llama")))
    assert adapter.config.save_modules == ["lm_head"]
    model = tiny("llama")
    attach(model, adapter.method, adapter.config, 0).load(adapter.tensors)
    torch.testing.assert_close(logits(model), logits(wrapped), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", BLOCKS)
@pytest.mark.parametrize(("name", "modules"), PLACES)
def test_what_is_written_comes_back_bit_for_bit(name: str, modules: list[str], method: str, tmp_path: Path) -> None:
    if method == "bitfit" and name == "gpt2":
        pytest.skip("all its places have biases")
    if method == "bitfit" and "norm" in modules:
        modules = ["norm"]  # its own places are in the MLP
    tiny(name).save_pretrained(tmp_path / "base")
    model, attachment, chosen = attached(name, modules, method)
    base = resolve(str(tmp_path / "base"))
    (tmp_path / "adapter").mkdir()
    write(tmp_path / "adapter", methods.get(method), chosen, skeleton(model), attachment.tensors(), base)
    again = read(tmp_path / "adapter", skeleton(model))
    own = attachment.tensors()
    assert set(again.tensors) == set(own)
    attach(tiny(name), again.method, again.config, 0).load(again.tensors)
    assert all(torch.equal(tensor, own[key]) for key, tensor in again.tensors.items())


@pytest.mark.parametrize(("name", "modules"), PLACES[:1] + PLACES[3:])
def test_merged_into_plain_weights(name: str, modules: list[str], tmp_path: Path) -> None:
    from tests.runs import CONFIGS

    tiny(name).save_pretrained(tmp_path / "base")
    for file in (CONFIGS / "tokenizer").iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    model, attachment, chosen = attached(name, modules)
    base = resolve(str(tmp_path / "base"))
    (tmp_path / "adapter").mkdir()
    write(tmp_path / "adapter", methods.get("lora"), chosen, skeleton(model), attachment.tensors(), base)
    result = merge([str(tmp_path / "adapter")], tmp_path / "merged")
    assert result["max_logit_difference"] < 1e-4
    merged = load(find(str(tmp_path / "merged"))).policy.model
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        (["lm_haed"], "'lm_haed' is no module of LlamaForCausalLM; did you mean lm_head?"),
        (["act_fn"], "'act_fn' has no parameters"),
        (["layers.0.mlp"], "model.layers.0.mlp.gate_proj is adapted as well"),
    ],
)
def test_what_cannot_be_saved_is_said(modules: list[str], said: str, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(TargetError, match=said.replace("?", r"\?")):
        count(resolve(str(tmp_path)), methods.get("lora"), config("lora", modules))
    with pytest.raises(TargetError, match=said.replace("?", r"\?")):
        attach(tiny("llama"), methods.get("lora"), config("lora", modules), 0)
