"""A policy may be compared with an adapter of its own method that a folder holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftctl.errors import FormatError, InputError, Stopped
from tests import runs

LN2 = float(torch.tensor(math.log(2), dtype=torch.float32))
METHODS = ["lora", "prefix", "bottleneck", "bitfit"]


def after(first: Path, method: str = "lora", objective: str = "dpo", /, **blocks: dict[str, Any]) -> dict[str, Any]:
    """A preference run on the base of a first run, compared with what came out of it."""
    more = {"model": {"name": str(first / "base")}, "objective": {"reference": str(first)}} | blocks
    return runs.document(method, objective, **more)


def losses(output: Path) -> list[float]:
    return [event["loss"] for event in runs.events(output) if event["event"] == "step"]


@pytest.mark.parametrize("method", METHODS)
def test_compared_with_the_adapter_it_starts_from_is_compared_with_its_start(method: str, tmp_path: Path) -> None:
    first = tmp_path / "first"
    runs.train(first, runs.document(method))
    begun = {"method": {"init_from": str(first)}}
    runs.train(tmp_path / "path", after(first, method, **begun))
    runs.train(tmp_path / "initial", after(first, method, **begun, objective={"reference": "initial"}))
    assert losses(tmp_path / "path")[0] == LN2 != losses(tmp_path / "path")[-1]
    assert runs.untimed(tmp_path / "path") == runs.untimed(tmp_path / "initial")


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_another_adapter_is_another_reference_and_stays_the_same_when_resumed(objective: str, tmp_path: Path) -> None:
    first, cut = tmp_path / "first", tmp_path / "cut"
    runs.train(first, runs.document())
    contents = after(first, "lora", objective)
    runs.train(tmp_path / "whole", contents)
    assert losses(tmp_path / "whole")[0] not in (LN2, 0.5), "the policy starts as the base"
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
    model = {"objective": {"reference": str(first / "base")}}
    refused(InputError, "objective.reference: .*base is neither a run nor an adapter", **model)
    with pytest.raises(InputError, match=r"objective\.reference: .* holds lora, the recipe asks for bitfit"):
        runs.train(tmp_path / "second", after(first, "bitfit"))
    assert not (tmp_path / "second" / "adapter").exists()


def test_a_reference_is_a_word_or_a_path_from_where_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    for written, meant in (("initial", "initial"), ("base", "base"), ("old", str(tmp_path / "old"))):
        recipe = runs.loaded(tmp_path / "run", runs.document("lora", "dpo", objective={"reference": written}))
        assert recipe.objective.model_dump()["reference"] == meant
