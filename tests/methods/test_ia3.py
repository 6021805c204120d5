"""(IA)3's own: counts by the formula, its places, inputs scaled before their module, and the `peft` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError

from peftctl.errors import FormatError, TargetError
from peftctl.methods.ia3 import METHOD, Ia3Config
from peftctl.methods.ia3.peft import EXCHANGE
from peftctl.surgery import skeleton
from tests.methods import contract, oracle
from tests.models import tiny


def ia3(**keys: Any) -> Ia3Config:
    return Ia3Config(name="ia3", **keys)


VARIANTS = {
    "outputs only": ia3(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
    "inputs only": ia3(target_modules=[], feedforward_modules=["up_proj", "gate_proj"]),
    "one name on either side": ia3(target_modules=["0.mlp.down_proj"], feedforward_modules=["1.mlp.down_proj"]),
    "regex": ia3(target_modules=r".*\.1\.self_attn\..*", feedforward_modules=r".*mlp\.down_proj"),
}


@pytest.mark.parametrize("check", contract.FULL, ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_keep_the_contract(variant: str, check: Any) -> None:
    check(VARIANTS[variant], "llama")


def test_counts_by_the_papers_formula() -> None:
    layers, grouped, middle = 2, 2 * 8, 64
    assert METHOD.count(skeleton(tiny("llama")), ia3()).total == layers * (2 * grouped + middle)
    # fused with the query's: 3 d; GPT-2's MLP is 4 d wide
    assert METHOD.count(skeleton(tiny("gpt2")), ia3()).total == layers * (3 * 32 + 4 * 32)
    places = METHOD.count(skeleton(tiny("bert")), ia3()).places
    assert {path.rpartition("layer.0.")[2] for path in places if "layer.0" in path} == {
        "attention.self.key",
        "attention.self.value",
        "output.dense",
    }


@torch.no_grad()
def test_scales_inputs_before_and_outputs_after_their_linear() -> None:
    model, attachment = contract.attached(ia3(), "llama")
    contract.disturb(attachment)
    scale = attachment.tensors()
    block = model.model.layers[0]
    x = torch.randn(1, 3, 64)
    expected = (x * scale["model.layers.0.mlp.down_proj.scale"]) @ block.mlp.down_proj.weight.T
    torch.testing.assert_close(block.mlp.down_proj(x), expected)
    torch.testing.assert_close(block.mlp.down_proj(input=x), expected)
    h = torch.randn(1, 3, 32)
    expected = (h @ block.self_attn.k_proj.weight.T) * scale["model.layers.0.self_attn.k_proj.scale"]
    torch.testing.assert_close(block.self_attn.k_proj(h), expected)


@torch.no_grad()
def test_a_small_change_survives_half_precision() -> None:
    model, attachment = contract.attached(ia3(), "llama")
    linear = model.model.layers[0].self_attn.k_proj.bfloat16()
    delta = dict(attachment.named_deltas())["model.layers.0.self_attn.k_proj"]
    delta.scale.fill_(1.003)  # bfloat16 would round it to 1
    with attachment.disabled():
        before = linear(torch.ones(1, 32, dtype=torch.bfloat16))
    after = linear(torch.ones(1, 32, dtype=torch.bfloat16))
    assert after.dtype == torch.bfloat16 and not torch.equal(before, after)


@pytest.mark.parametrize(
    ("name", "keys", "says"),
    [
        ("mixtral", {}, "MixtralForCausalLM has no single linear that ends its MLP"),
        ("llama", {"feedforward_modules": ["k_proj"]}, r"layers\.0\.self_attn\.k_proj of .* as well"),
        ("llama", {"feedforward_modules": ["dwn_proj"]}, "method.feedforward_modules: .*did you mean down_proj"),
    ],
)
def test_refuses_by_name(name: str, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(TargetError, match=says):
        METHOD.count(skeleton(tiny(name)), ia3(**keys))


def test_serves_experts_without_the_mlp() -> None:
    contract.folds_or_refuses(ia3(feedforward_modules=[]), "mixtral")


def test_refuses_to_train_nothing() -> None:
    with pytest.raises(ValidationError, match="nothing would be trained"):
        ia3(target_modules=[], feedforward_modules=[])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "qwen3", "phi3", "bert"])
def test_peft_computes_the_same_from_our_files(name: str, tmp_path: Path) -> None:
    keys = oracle.reads_what_we_wrote(ia3(), name, tmp_path)
    assert keys["fan_in_fan_out"] == (name == "gpt2")
    oracle.comes_back(ia3(), name, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_reads_every_variant(variant: str, tmp_path: Path) -> None:
    oracle.reads_what_we_wrote(VARIANTS[variant], "llama", tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_pefts_files_compute_the_same_here(name: str, tmp_path: Path) -> None:
    theirs = peft.IA3Config(task_type=None if name == "bert" else "CAUSAL_LM")
    oracle.wrote_what_we_read(theirs, "ia3", name, tmp_path)


def test_refuses_files_that_are_no_factors() -> None:
    table, name = skeleton(tiny("llama")), "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
    with pytest.raises(FormatError, match="neither row nor column"):
        EXCHANGE.read({}, table, {name: torch.ones(16, 2)})
    with pytest.raises(FormatError, match=r"holds none of \.ia3_l"):
        EXCHANGE.read({}, table, {})
    with pytest.raises(FormatError, match="modules_to_save"):
        EXCHANGE.read({"modules_to_save": ["lm_head"]}, table, {name: torch.ones(16, 1)})
