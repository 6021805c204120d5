"""BitFit's own: which biases, counts by the paper's formula, what it would add to a model without any."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftctl import opened
from peftctl.base import resolve
from peftctl.errors import FormatError, TargetError, Unfoldable
from peftctl.exporting import export
from peftctl.formats import peft as peft_format
from peftctl.formats.peft import write
from peftctl.merging import merge
from peftctl.methods.bitfit import METHOD, BitfitConfig
from peftctl.surgery import find, skeleton
from tests.methods import contract, exchange
from tests.models import logits, tiny
from tests.runs import CONFIGS


def bitfit(**keys: Any) -> BitfitConfig:
    return BitfitConfig(name="bitfit", **keys)


@pytest.mark.parametrize("check", contract.FULL, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", bitfit(add_missing=True)),
        ("llama", bitfit(add_missing=True, biases="query+mlp")),
        ("opt", bitfit(biases="query+mlp")),
        ("bert", bitfit(biases="query+mlp")),
        ("gptj", bitfit(add_missing=True)),
    ],
    ids=str,
)
def test_variants_keep_the_contract(name: str, config: BitfitConfig, check: Any) -> None:
    check(config, name)


def test_counts_by_the_papers_formula() -> None:
    # 11 d in a layer of GPT-2 (query, key and value 3 d, output d, MLP 4 d and d, two norms 2 d), and the last norm
    assert METHOD.count(skeleton(tiny("gpt2")), bitfit()).total == 2 * 11 * 32 + 32
    # BERT with an MLP of 64 = 2 d: 9 d a layer, the norm of the embeddings; then the head: dense, norm, decoder
    assert METHOD.count(skeleton(tiny("bert")), bitfit()).total == 2 * 9 * 32 + 32 + (32 + 32 + 128)
    # the paper's half: the query's d and the MLP middle's
    assert METHOD.count(skeleton(tiny("bert")), bitfit(biases="query+mlp")).total == 2 * (32 + 64)


def test_a_bias_that_two_modules_share_is_trained_once() -> None:
    places = METHOD.count(skeleton(tiny("bert")), bitfit()).places
    assert "cls.predictions.decoder" in places and "cls.predictions" not in places


def test_a_model_without_biases_is_refused_with_what_would_be_added() -> None:
    with pytest.raises(TargetError) as refusal:
        METHOD.count(skeleton(tiny("llama")), bitfit())
    each = 32 + 16 + 16 + 32 + 64 + 64 + 32
    assert str(refusal.value) == (
        "method.biases: LlamaForCausalLM has no bias in q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; "
        f"add_missing: true would add 14 there, {2 * each} parameters"
    )
    counted = METHOD.count(skeleton(tiny("llama")), bitfit(add_missing=True))
    assert counted.total == 2 * each and len(counted.places) == 14 and "lm_head" not in counted.places


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gpt2", "query projection of its own in every layer, and transformer.h.0 of GPT2LMHeadModel has c_attn"),
        ("mixtral", "an MLP's middle in every layer"),
        ("gptj", "has no bias at q_proj; add_missing: true would add 2 there, 64 parameters"),
    ],
)
def test_the_papers_half_is_refused_by_name_where_it_has_no_place(name: str, says: str) -> None:
    with pytest.raises(TargetError, match=says):
        METHOD.count(skeleton(tiny(name)), bitfit(biases="query+mlp"))


def test_an_added_bias_cannot_be_folded_but_the_others_can() -> None:
    model, attachment = contract.attached(bitfit(add_missing=True), "gptj")
    for path, delta, _ in attachment.places:
        module = find(model, path)
        if getattr(module, "bias", None) is not None:
            assert delta.fold("bias", module.bias).shape == module.bias.shape
            continue
        with pytest.raises(Unfoldable, match="the architecture has no bias there"):
            delta.fold("bias", module.weight)


def exported(name: str, folder: Path, **keys: Any) -> tuple[Any, torch.Tensor]:
    """A disturbed adapter of a base on disk, exported in peft's form; that base, and our logits."""
    tiny(name).save_pretrained(folder / "base")
    shutil.copytree(CONFIGS / "tokenizer", folder / "base", dirs_exist_ok=True)
    chosen = bitfit(**keys)
    model, attachment = contract.attached(chosen, name)
    contract.disturb(attachment)
    (folder / "adapter").mkdir()
    base = resolve(str(folder / "base"))
    write(folder / "adapter", METHOD, chosen, skeleton(model), attachment.tensors(), base)
    expected = contract.answer(model, attachment)
    export(str(folder / "adapter"), folder / "theirs", to="peft")
    return base, expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("biases", ["all", "query+mlp"])
@pytest.mark.parametrize("name", ["opt", "gpt2", "gpt_neox", "bloom", "gptj"])
def test_peft_computes_the_same_from_the_form_of_a_lora(name: str, biases: str, tmp_path: Path) -> None:
    if biases == "query+mlp" and name != "opt":
        return
    _, expected = exported(name, tmp_path, biases=biases)
    assert {p.name for p in (tmp_path / "theirs").iterdir()} == {
        peft_format.CONFIG,
        peft_format.WEIGHTS,
        "manifest.json",
    }
    torch.testing.assert_close(exchange.theirs(tmp_path / "theirs", name), expected, rtol=1e-5, atol=1e-5)
    again = opened.find(str(tmp_path / "theirs"))
    assert again.adapter is not None and again.adapter.method.name == "lora"
    ours = opened.open(again, device="cpu").policy.model
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)


def test_merging_replaces_biases_and_touches_nothing_else(tmp_path: Path) -> None:
    exported("gpt2", tmp_path)
    merge([str(tmp_path / "adapter")], tmp_path / "merged")
    merge([str(tmp_path / "theirs")], tmp_path / "again")
    changes = {
        f"{name.removeprefix('transformer.')}": t
        for name, t in load_file(tmp_path / "adapter" / peft_format.WEIGHTS).items()
    }
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert len(changes) > 10
    for name, tensor in before.items():
        change = changes.get(name.removeprefix("transformer."))
        assert torch.equal(after[name], tensor if change is None else tensor + change)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "merged" / "model.safetensors"
    ).read_bytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_peft_computes_the_same_of_biases_that_the_base_lacks(name: str, tmp_path: Path) -> None:
    _, expected = exported(name, tmp_path, add_missing=True)
    torch.testing.assert_close(exchange.theirs(tmp_path / "theirs", name), expected, rtol=1e-5, atol=1e-5)


def test_biases_that_peft_has_no_form_for_are_refused(tmp_path: Path) -> None:
    said = (
        r"no form for a bias that the base lacks \(\S+\) beside that of a (Norm|Conv1D) \(\S+\); serve the adapter with"
    )
    with pytest.raises(FormatError, match=said):
        exported("gptj", tmp_path, add_missing=True)
    assert not (tmp_path / "theirs").exists()
