"""A policy may be compared with an adapter of its own method that a folder holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftctl.errors import FormatError, InputError, Stopped
from peftctl.merging import merge
from tests import runs
from tests.runs import even, losses

METHODS = ["lora", "prefix", "bottleneck", "bitfit"]


def after(first: Path, method: str = "lora", objective: str = "dpo", /, **blocks: dict[str, Any]) -> dict[str, Any]:
    """A preference run on the base of a first run, compared with what came out of it."""
    more = {"model": {"name": str(first / "base")}, "objective": {"reference": str(first)}} | blocks
    return runs.document(method, objective, **more)


@pytest.mark.parametrize("method", METHODS)
def test_compared_with_the_adapter_it_starts_from_is_compared_with_its_start(method: str, tmp_path: Path) -> None:
    first = tmp_path / "first"
    runs.train(first, runs.document(method))
    begun = {"method": {"init_from": str(first)}}
    runs.train(tmp_path / "path", after(first, method, **begun))
    runs.train(tmp_path / "initial", after(first, method, **begun, objective={"reference": "initial"}))
    first_loss, *_, last_loss = losses(tmp_path / "path")
    assert even(first_loss) and not even(last_loss)
    assert runs.untimed(tmp_path / "path") == runs.untimed(tmp_path / "initial")


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_another_adapter_is_another_reference_and_stays_the_same_when_resumed(objective: str, tmp_path: Path) -> None:
    first, cut = tmp_path / "first", tmp_path / "cut"
    runs.train(first, runs.document())
    contents = after(first, "lora", objective)
    runs.train(tmp_path / "whole", contents)
    start = losses(tmp_path / "whole")[0]
    assert not even(start) and abs(start - 0.5) > 1e-6, "the policy starts as the base"
    with runs.stopped_after(2, cut), pytest.raises(Stopped):
        runs.train(cut, contents)
    path = first / "adapter" / "adapter_model.safetensors"
    held = load_file(cut / "checkpoints" / "step-000002" / "reference.safetensors")
    assert all(any(torch.equal(value, other) for other in load_file(path).values()) for value in held.values())
    (path.parent / "manifest.json").unlink()
    save_file({name: value + 1 for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    runs.train(cut, contents, resume=True)
    assert runs.untimed(tmp_path / "whole") == runs.untimed(cut)


def test_what_cannot_take_the_adapters_place_is_refused(tmp_path: Path) -> None:
    first = tmp_path / "first"
    runs.train(first, runs.document())

    def refused(kind: type[Exception], said: str, **blocks: dict[str, Any]) -> None:
        with pytest.raises(kind, match=said):
            runs.train(tmp_path / "second", after(first, **blocks))

    refused(
        InputError,
        r"first/adapter has the scale \(alpha / rank\) of model\S+ 2.0, not 0.75; .*; set method as",
        method={"alpha": 3},
    )
    refused(FormatError, "objective.reference .*: missing", method={"target_modules": ["v_proj"]})
    none = {"objective": {"reference": str(first / "checkpoints")}}
    refused(InputError, "objective.reference: .*checkpoints is neither a run nor an adapter nor a model", **none)
    with pytest.raises(InputError, match=r"objective\.reference: .* holds lora, the recipe asks for bitfit"):
        runs.train(tmp_path / "second", after(first, "bitfit"))
    assert not (tmp_path / "second" / "adapter").exists()


def test_another_model_is_a_reference_whatever_it_is_built_like(tmp_path: Path) -> None:
    first, merged = tmp_path / "first", tmp_path / "merged"
    runs.train(first, runs.document())
    merge([str(first / "adapter")], merged)
    for name, reference in (("adapter", first), ("model", merged), ("same", first / "base"), ("base", "base")):
        runs.train(tmp_path / name, after(first, objective={"reference": str(reference)}))
    assert losses(tmp_path / "model") == pytest.approx(losses(tmp_path / "adapter"), rel=1e-4)
    assert even(losses(tmp_path / "same")[0]) and not even(losses(tmp_path / "model")[0])
    assert losses(tmp_path / "same") == losses(tmp_path / "base")
    other = tmp_path / "other"
    gpt2 = {"name": str(runs.CONFIGS / "models" / "tiny-gpt2.json")}
    runs.train(other, runs.document("lora", model=gpt2, method={"target_modules": "all-linear"}))
    contents = after(first, objective={"reference": str(other / "base")})
    runs.train(tmp_path / "whole", contents)
    with runs.stopped_after(2, tmp_path / "cut"), pytest.raises(Stopped):
        runs.train(tmp_path / "cut", contents)
    runs.train(tmp_path / "cut", contents, resume=True)
    assert runs.untimed(tmp_path / "whole") == runs.untimed(tmp_path / "cut")
    weights = other / "base" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match="the reference's content"):
        runs.train(tmp_path / "cut", contents | {"train": contents["train"] | {"max_steps": 6}}, resume=True)


def test_a_model_that_reads_other_tokens_is_refused(tmp_path: Path) -> None:
    first = tmp_path / "first"
    runs.train(first, runs.document())
    shutil.copytree(first / "base", tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    own = json.loads(path.read_text())
    own["model"]["vocab"] = dict(zip(own["model"]["vocab"], reversed(own["model"]["vocab"].values()), strict=True))
    path.write_text(json.dumps(own))
    with pytest.raises(InputError, match=r"objective\.reference: .*other has other tokens than .*same tokenizer"):
        runs.train(tmp_path / "second", after(first, objective={"reference": str(tmp_path / "other")}))
    assert not (tmp_path / "second").exists()


def test_a_reference_is_a_word_or_a_path_from_where_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    for written, meant in (("initial", "initial"), ("base", "base"), ("old", str(tmp_path / "old"))):
        recipe = runs.loaded(tmp_path / "run", runs.document("lora", "dpo", objective={"reference": written}))
        assert recipe.objective.model_dump()["reference"] == meant
