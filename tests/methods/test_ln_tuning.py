"""LN-tuning's own: counts by hand, norms of every formula, the fast kernels beside it, and the `peft` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from peftctl.errors import TargetError
from peftctl.methods.ln_tuning import METHOD, LnTuningConfig
from peftctl.surgery import skeleton
from tests.methods import contract, oracle
from tests.models import tiny


def ln(**keys: Any) -> LnTuningConfig:
    return LnTuningConfig(name="ln-tuning", **keys)


@pytest.mark.parametrize("check", contract.FULL, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_final_norm_alone_keeps_the_contract(name: str, check: Any) -> None:
    check(ln(target_modules={"llama": ["model.norm"], "gpt2": ["ln_f"]}[name]), name)


def test_counts_by_hand() -> None:
    # two norms a layer and the last, weights alone; GPT-2's have biases too; Qwen 3 norms each head of 8 twice a layer
    assert METHOD.count(skeleton(tiny("llama")), ln()).total == (2 * 2 + 1) * 32
    assert METHOD.count(skeleton(tiny("gpt2")), ln()).total == (2 * 2 + 1) * 2 * 32
    assert METHOD.count(skeleton(tiny("qwen3")), ln()).total == (2 * 2 + 1) * 32 + 2 * 2 * 8
    assert METHOD.count(skeleton(tiny("qwen3")), ln(target_modules=["model.norm"])).total == 32


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma", "llama", "gpt2", "t5", "mpt"])
def test_a_norm_with_the_trained_numbers_in_it_answers_alike(name: str) -> None:
    """Whatever it computes: Gemma multiplies by 1 + weight, T5 and MPT have no bias."""
    model, attachment = contract.attached(ln(), name)
    contract.disturb(attachment)
    other = tiny(name)
    for path, delta in attachment.named_deltas():
        for key, value in delta.tensors().items():
            other.get_submodule(path).get_parameter(key).copy_(value)
    assert torch.equal(contract.answer(model, attachment), contract.answer(other, contract.Attachment()))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_failing_module_gets_its_own_parameters_back(name: str) -> None:
    model, attachment = contract.attached(ln(), name)
    path, _ = next(attachment.named_deltas())
    norm = model.get_submodule(path)
    with pytest.raises((RuntimeError, TypeError)):
        norm(torch.zeros(1, 2, 5))
    assert norm.weight is norm._parameters["weight"]


@pytest.mark.parametrize(
    ("targets", "says"), [(["q_proj"], "'q_proj' is a Linear"), (["norn"], "norn.* did you mean norm")]
)
def test_refuses_what_is_no_norm(targets: list[str], says: str) -> None:
    with pytest.raises(TargetError, match=says):
        METHOD.count(skeleton(tiny("llama")), ln(target_modules=targets))


def test_refuses_a_model_without_norms_by_name() -> None:
    table = skeleton(tiny("llama"))
    bare = table._replace(modules=tuple(m for m in table.modules if m.kind != "Norm"))
    with pytest.raises(TargetError, match="LlamaForCausalLM has no norm"):
        METHOD.count(bare, ln())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt_neox", "qwen3", "gemma", "bert"])
def test_peft_computes_the_same_from_our_files(name: str, tmp_path: Path) -> None:
    oracle.reads_what_we_wrote(ln(), name, tmp_path)
    oracle.comes_back(ln(), name, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_pefts_files_compute_the_same_here(name: str, tmp_path: Path) -> None:
    oracle.wrote_what_we_read(peft.LNTuningConfig(task_type="CAUSAL_LM"), "ln-tuning", name, tmp_path)
