"""P-tuning's own: its encoders written out, published counts, and files of the `peft` package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError

from peftctl.errors import FormatError
from peftctl.methods.p_tuning import METHOD, PTuningConfig, shapes
from peftctl.methods.p_tuning.delta import Encoded
from peftctl.surgery import skeleton
from tests import runs
from tests.methods import contract, oracle
from tests.models import tiny

TOKENS = 5


def p_tuning(**keys: Any) -> PTuningConfig:
    return PTuningConfig(name="p-tuning", **({"num_virtual_tokens": TOKENS} | keys))


VARIANTS = {
    "mlp": p_tuning(hidden_size=24),
    "lstm": p_tuning(encoder="lstm", hidden_size=12),
    "as they are": p_tuning(encoder="none"),
}


@pytest.mark.parametrize("check", contract.FULL, ids=lambda check: check.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_variants_keep_the_contract(name: str, variant: str, check: Any) -> None:
    check(VARIANTS[variant], name)


def test_counts_what_is_published() -> None:
    """bloomz-560m, 1024 wide: 20 virtual tokens and an MLP of 128 are 300,288 numbers."""
    config = p_tuning(num_virtual_tokens=20, hidden_size=128)
    table = skeleton(tiny("bloom"))
    wide = [m._replace(shapes={"weight": (128, 1024)}) if m.kind == "Embedding" else m for m in table.modules]
    assert METHOD.count(table._replace(modules=tuple(wide)), config).total == 300_288


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_shapes_are_those_that_are_built(variant: str) -> None:
    config = VARIANTS[variant]
    built = {name: tuple(p.shape) for name, p in Encoded(config, 32).named_parameters()}
    assert built == shapes(config, 32)


@torch.no_grad()
def test_the_mlp_written_out() -> None:
    encoder = Encoded(VARIANTS["mlp"], 32)
    t = encoder.tensors()
    h = t["embedding"]
    for index in range(3):
        h = h @ t[f"linears.{index}.weight"].T + t[f"linears.{index}.bias"]
        h = torch.relu(h) if index < 2 else h
    torch.testing.assert_close(encoder.rows(), h)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_the_encoders_are_pefts(kind: str) -> None:
    theirs = peft.PromptEncoder(
        peft.PromptEncoderConfig(
            num_virtual_tokens=TOKENS,
            token_dim=32,
            num_transformer_submodules=1,
            encoder_reparameterization_type=kind,
            encoder_hidden_size=12,
            encoder_num_layers=2,
        )
    ).eval()
    ours = Encoded(p_tuning(encoder=kind.lower(), hidden_size=12), 32).eval()
    renamed = {
        name.replace("embedding.weight", "embedding").replace("lstm_head", "lstm"): tensor
        for name, tensor in theirs.state_dict().items()
    }
    for index in range(3):
        renamed = {n.replace(f"mlp_head.{2 * index}.", f"linears.{index}."): tensor for n, tensor in renamed.items()}
    ours.load_state_dict(renamed)
    torch.testing.assert_close(ours.rows(), theirs(torch.arange(TOKENS)[None])[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_computes_the_same_from_our_files(name: str, variant: str, tmp_path: Path) -> None:
    oracle.reads_what_we_wrote(VARIANTS[variant], name, tmp_path)
    oracle.comes_back(VARIANTS[variant], name, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_pefts_files_compute_the_same_here(kind: str, tmp_path: Path) -> None:
    theirs = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=TOKENS,
        encoder_reparameterization_type=kind,
        encoder_hidden_size=32,
        encoder_dropout=0.0,
    )
    oracle.wrote_what_we_read(theirs, "p-tuning", "llama", tmp_path)


def test_a_checkpoint_keeps_the_encoder_and_the_adapter_does_not_need_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    document = runs.document("p-tuning", method={"encoder": "lstm", "num_virtual_tokens": 3})
    runs.train(tmp_path / "run", document, verify=True)
    files = (tmp_path / "run" / "checkpoints" / "step-000004").glob("*.safetensors")
    kept = {name for file in files for name in load_file(file)}
    assert any("lstm.weight_ih_l0" in name for name in kept)
    assert list(runs.adapter(tmp_path / "run")) == ["prompt_embeddings"]
    document = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert document["peft_type"] == "P_TUNING" and document["num_virtual_tokens"] == 3


def test_refuses_a_width_of_nothing() -> None:
    with pytest.raises(ValidationError, match="width of the encoder"):
        p_tuning(encoder="none", hidden_size=8)


def test_the_embeddings_alone_are_refused_where_an_encoder_is_meant() -> None:
    _, attachment = contract.attached(VARIANTS["mlp"], "llama")
    with pytest.raises(FormatError, match=r"set method\.encoder: none"):
        attachment.load({"embedding": torch.zeros(TOKENS, 32)})
    with pytest.raises(FormatError, match=r"linears\.0\.weight: missing"):
        attachment.load({"embedding": torch.zeros(TOKENS, 32), "linears.0.bias": torch.zeros(24)})
