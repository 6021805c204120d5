"""Finding and loading a base: what works, and one line for each thing that does not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftctl import base as bases
from peftctl import model as models
from peftctl.compute import AUTO, Precision
from peftctl.errors import ModelError
from tests import runs
from tests.models import tiny

LLAMA = runs.CONFIGS / "models" / "tiny-llama.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _with(**keys: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return change


def _pickled(folder: Path) -> None:
    os.replace(folder / "model.safetensors", folder / "pytorch_model.bin")


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


REFUSED: list[tuple[Callable[[Path], object], str]] = [
    (shutil.rmtree, "there is no folder"),
    (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
    (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), "is not JSON"),
    (lambda folder: (folder / "config.json").write_text("[]"), "has no model_type"),
    (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    (_pickled, "only pickles"),
    (_cut, "cannot be loaded"),
    (lambda folder: (folder / "model.safetensors").write_text("not tensors"), "cannot be loaded"),
    (_with(auto_map={"AutoModel": "own.Model"}), "--trust-remote-code"),
    (_with(vision_config={}), "is a vision-language model"),
    (_with(audio_config={}), "is an audio model"),
    (_with(is_encoder_decoder=True), "has no seq2seq-lm of its kind"),
    (_with(model_type="vit"), "it is no causal language model"),
    (_with(model_type="gpt2", hidden_size=30), "divisible"),
    (_with(model_type="unheard-of"), "cannot use its config"),
    (_with(num_hidden_layers=3), "lacks 9 tensors"),
    (_with(intermediate_size=65), "cannot be loaded"),
    (_with(hidden_size="wide"), "cannot use its config"),
]


@pytest.mark.parametrize(("harm", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_cannot_be_served_is_refused_in_one_line(harm: Callable[[Path], object], said: str, folder: Path) -> None:
    harm(folder)
    with pytest.raises(ModelError) as caught:
        models.load(bases.resolve(str(folder)), AUTO, "cpu", 0)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_loads_as_stored_frozen_and_in_eval_mode(folder: Path) -> None:
    model = models.load(bases.resolve(str(folder)), AUTO, "cpu", 0)
    expected = tiny("llama").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    half = models.load(bases.resolve(str(folder)), Precision("bfloat16", "bfloat16"), "cpu", 0)
    assert next(half.parameters()).dtype == torch.bfloat16


def test_a_bare_architecture_is_drawn_by_its_seed() -> None:
    base = bases.resolve(str(LLAMA))
    one, same, other = (models.load(base, AUTO, "cpu", seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_the_fingerprint_is_of_config_and_weights(folder: Path) -> None:
    base = bases.resolve(str(folder))
    found = {bases.fingerprint(base)}
    _with(rope_theta=7.0)(folder)
    found.add(bases.fingerprint(base))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert len(found | {bases.fingerprint(base)}) == 3


def test_the_second_skeleton_needs_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path))
    expected = models.skeleton(bases.resolve(str(LLAMA))).parameters()
    code = (
        "import sys; from peftctl import base, model\n"
        f"found = model.skeleton(base.resolve({str(LLAMA)!r})).parameters()\n"
        "print(found, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(runs.CONFIGS.parent)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [str(expected), "False", "False"]


def test_a_damaged_cache_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path))
    expected = models.skeleton(bases.resolve(str(LLAMA)))
    for path in tmp_path.rglob("*.json"):
        path.write_text("{")
    assert models.skeleton(bases.resolve(str(LLAMA))) == expected
