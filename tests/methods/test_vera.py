"""VeRA's own: the formula written out, one pair for all, the paper's counts, the `peft` package as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from peftctl.folding import folds_of
from peftctl.methods.vera import METHOD, VeraConfig
from peftctl.surgery import find, out_in, skeleton
from tests.methods import contract, exchange
from tests.models import tiny


def vera(**keys: Any) -> VeraConfig:
    return VeraConfig(name="vera", **({"rank": 24} | keys))


VARIANTS = [
    ("llama", vera(target_modules=["q_proj", "down_proj"], projection_seed=5)),
    ("llama", vera(dropout=0.3, layers=[1])),
    ("gpt2", vera(d_initial=1.0)),
    ("opt", vera(target_modules=r".*\.fc[12]")),
]


@pytest.mark.parametrize("check", contract.FULL, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("name", "config"), VARIANTS, ids=str)
def test_variants_keep_the_contract(name: str, config: VeraConfig, check: Any) -> None:
    check(config, name)


@pytest.mark.parametrize(
    ("name", "path"), [("llama", "model.layers.1.mlp.down_proj"), ("gpt2", "transformer.h.0.attn.c_attn")]
)
def test_the_papers_formula_written_out(name: str, path: str) -> None:
    model, attachment = contract.attached(vera(), name)
    contract.disturb(attachment)
    tensors = {key: tensor.detach() for key, tensor in attachment.tensors().items()}
    module = find(model, path)
    weight = out_in(module, module.weight).detach()
    out, into = weight.shape
    b, d = torch.diag(tensors[f"{path}.b"]), torch.diag(tensors[f"{path}.d"])
    changed = weight + b @ tensors["b"][:out] @ d @ tensors["a"][:, :into]
    x = torch.randn(3, into, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = x @ changed.T + (0 if module.bias is None else module.bias)
        torch.testing.assert_close(module(x[None])[0], expected, rtol=1e-5, atol=1e-5)


def test_the_matrices_are_shared_saved_once_and_not_trained() -> None:
    _, attachment = contract.attached(vera(), "llama")
    tensors = attachment.tensors()
    assert {key: tuple(tensors[key].shape) for key in ("a", "b")} == {"a": (24, 64), "b": (64, 24)}
    assert not {"a", "b"} & set(attachment.trainable())
    assert len(tensors) == 2 + 2 * 14


def test_the_seed_of_the_recipe_is_all_that_they_depend_on() -> None:
    def drawn(seed: int, projection_seed: int) -> torch.Tensor:
        return contract.attached(vera(projection_seed=projection_seed), "llama", seed)[1].tensors()["a"]

    assert torch.equal(drawn(0, 3), drawn(1, 3)) and not torch.equal(drawn(0, 3), drawn(0, 4))


def test_counts_by_hand() -> None:
    table = skeleton(tiny("llama"))
    assert METHOD.count(table, vera(target_modules=["q_proj", "v_proj"])).total == 2 * (24 + 32 + 24 + 16)
    with torch.device("meta"):
        roberta = transformers.RobertaForMaskedLM(transformers.RobertaConfig())
    # the paper's 0.043 M for RoBERTa-base: L x modules x (d + r)
    counted = METHOD.count(skeleton(roberta), vera(rank=1024, target_modules=["query", "value"]))
    assert counted.total == 12 * 2 * (768 + 1024) == 43_008


def test_merging_passes_over_what_only_holds_tensors() -> None:
    model, attachment = contract.attached(vera(), "llama")
    assert len(folds_of(attachment, model)) == 14


@pytest.mark.filterwarnings("ignore")  # peft's own remarks
@pytest.mark.parametrize(("name", "config"), VARIANTS, ids=str)
def test_peft_computes_the_same_from_our_files(name: str, config: VeraConfig, tmp_path: Path) -> None:
    _, expected = exchange.written(tmp_path, config, name)
    torch.testing.assert_close(exchange.theirs(tmp_path, name), expected, rtol=1e-5, atol=2e-5)
    assert torch.equal(exchange.ours(tmp_path, "vera", name), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj"]}),
        ("llama", {"target_modules": ["q_proj", "k_proj"], "projection_prng_key": 9, "save_projection": False}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "d_initial": 0.5}),
    ],
)
def test_pefts_files_compute_the_same_here(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    expected = exchange.saved_by_peft(tmp_path, peft.VeraConfig(task_type="CAUSAL_LM", r=24, **keys), name)
    stored = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert ("base_model.vera_A" in stored) == keys.get("save_projection", True)
    torch.testing.assert_close(exchange.ours(tmp_path, "vera", name), expected, rtol=1e-5, atol=2e-5)
