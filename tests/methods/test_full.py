"""Full fine-tuning's own: every weight once, tied ones at all their places, the published counts, streamed merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from torch import nn

from peftctl.errors import TargetError, Unfoldable
from peftctl.folding import folds_of
from peftctl.merge import merge
from peftctl.methods.attachment import Attachment
from peftctl.methods.full import METHOD, FullConfig
from peftctl.surgery import skeleton
from tests.methods import contract
from tests.models import NAMES, inputs, logits, tiny


def full(**keys: Any) -> FullConfig:
    return FullConfig(name="full", **keys)


@pytest.mark.parametrize("check", contract.FULL, ids=lambda check: check.__name__)
@pytest.mark.parametrize("keys", [{"last_layers": 1}, {"target_modules": "all-linear", "layers": [0]}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_parts_keep_the_contract(name: str, keys: dict[str, Any], check: Any) -> None:
    check(full(**keys), name)


@pytest.mark.parametrize("name", NAMES)
def test_counts_every_parameter_once(name: str) -> None:
    assert METHOD.count(skeleton(tiny(name)), full()).total == tiny(name).num_parameters()


def test_counts_what_the_papers_print() -> None:
    """GPT-2 medium: 354,823,168 in all, and 2 (12 d^2 + 13 d) = 25,192,448 in its two top layers."""
    with torch.device("meta"):
        config = transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16)
        table = skeleton(transformers.GPT2LMHeadModel(config))
    assert METHOD.count(table, full()).total == 354_823_168
    assert METHOD.count(table, full(last_layers=2)).total == 2 * (12 * 1024**2 + 13 * 1024) == 25_192_448


def test_trains_as_training_the_model_itself_does() -> None:
    """The same losses and the same weights after some steps as plain torch on the model's own parameters."""
    for name in ("gpt2", "llama"):
        model, attachment = contract.attached(full(), name)
        other = tiny(name)
        ours = torch.optim.SGD(attachment.trainable().values(), lr=0.1)
        theirs = torch.optim.SGD(other.parameters(), lr=0.1)
        for _ in range(3):
            for optimizer, loss in (
                (ours, contract.loss(model, attachment)),
                (theirs, contract.loss(other, Attachment())),
            ):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        own = attachment.tensors()
        assert own.keys() == dict(other.named_parameters()).keys()  # a tied one under its first name alone
        for key, parameter in other.named_parameters():
            torch.testing.assert_close(own[key], parameter, rtol=1e-5, atol=1e-6)


def tied() -> transformers.PreTrainedModel:
    model = tiny("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    return model


def test_a_tied_weight_is_one_at_both_places() -> None:
    model, attachment = contract.attached(full(target_modules=["lm_head"]), "gpt2")
    assert list(attachment.tensors()) == ["transformer.wte.weight"]
    assert METHOD.count(skeleton(tied()), full(target_modules=["lm_head"])).places == {"transformer.wte": 128 * 32}
    contract.disturb(attachment)
    other = tied()
    other.transformer.wte.weight.data.copy_(attachment.tensors()["transformer.wte.weight"])
    assert torch.equal(contract.answer(model, attachment), logits(other))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("stored_twice", [False, True])
def test_merges_shard_by_shard_tied_or_not(name: str, stored_twice: bool, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, attachment = contract.attached(full(), name)
    contract.disturb(attachment)
    tiny(name).save_pretrained(tmp_path / "base")
    if stored_twice:  # as some published files have it
        file = tmp_path / "base" / "model.safetensors"
        tensors = load_file(file)
        tensors.setdefault("lm_head.weight", tensors.get("transformer.wte.weight", torch.empty(0)).clone())
        save_file(tensors, file, metadata={"format": "pt"})
    merge(tmp_path / "base", tiny(name), attachment, tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(merged), contract.answer(model, attachment))
    if stored_twice and name == "gpt2":
        saved = load_file(tmp_path / "merged" / "model.safetensors")
        assert torch.equal(saved["lm_head.weight"], saved["transformer.wte.weight"])


def test_a_change_at_one_of_two_tied_places_is_still_refused() -> None:
    model, attachment = contract.attached(contract.config("lora", target_modules=["wte"]), "gpt2")
    with pytest.raises(Unfoldable, match=r"wte\.weight is tied to lm_head\.weight"):
        folds_of(attachment, model)


def test_keeps_half_precision_weights_in_fp32_beside_them() -> None:
    model = tiny("llama").bfloat16()
    attachment = METHOD.attach(model, full()).eval()
    attachment.install(model)
    assert {p.dtype for p in attachment.trainable().values()} == {torch.float32}
    expected = tiny("llama").bfloat16()(**inputs(model)).logits
    assert torch.equal(model(**inputs(model)).logits, expected)


def test_only_the_chosen_layers_are_trained() -> None:
    places = METHOD.count(skeleton(tiny("llama")), full(layers=[1])).places
    assert places and all(path.startswith("model.layers.1.") for path in places)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"last_layers": 3}, "method.last_layers: LlamaForCausalLM has 2 layers"),
        ({"layers": [2]}, "method.layers: 2 is not a layer of LlamaForCausalLM; 0 to 1 are"),
        ({"target_modules": ["q_prj"]}, "did you mean q_proj"),
    ],
)
def test_refuses_by_name(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(TargetError, match=says):
        METHOD.count(skeleton(tiny("llama")), full(**keys))


def test_refuses_layers_said_twice() -> None:
    with pytest.raises(ValidationError, match="not both"):
        full(layers=[0], last_layers=1)


def test_the_base_is_served_by_modules_of_any_kind() -> None:
    """Experts are one three-dimensional parameter, OPT's positions a lookup of their own."""
    for name in ("mixtral", "opt"):
        contract.folds_or_refuses(full(), name)
        contract.trains_exactly_its_own(full(), name)
    assert isinstance(tiny("opt").model.decoder.embed_positions, nn.Embedding)
