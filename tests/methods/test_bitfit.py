"""BitFit's own: which biases, counts by the paper's formula, what it would add to a model without any."""

from __future__ import annotations

from typing import Any

import pytest

from peftctl.errors import TargetError, Unfoldable
from peftctl.methods.bitfit import METHOD, BitfitConfig
from peftctl.surgery import find, skeleton
from tests.methods import contract
from tests.models import tiny


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
