"""A smoke run of a base that is not here takes a small one in which the method finds its places, and says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftctl import commands, recipe
from peftctl.errors import TargetError
from peftctl.plan import Options, base_and_chat, plan
from tests import runs


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path / "cache"))


def written(task: str, objective: str, method: dict[str, Any], name: str = "not/here") -> Path:
    contents = {
        "model": {"name": name, "task": task},
        "method": method,
        "objective": {"name": objective},
        "data": {"train": "nor/here.jsonl"},
        "output": "run",
    }
    Path("recipe.yaml").write_text(json.dumps(contents))
    return Path("recipe.yaml")


def lora(*names: str) -> dict[str, Any]:
    return {"name": "lora", "rank": 2, "target_modules": list(names) or "all-linear"}


CASES = [
    ("causal-lm", "sft", lora(), "llama"),
    ("causal-lm", "sft", lora("q_proj"), "llama"),
    ("causal-lm", "dpo", lora("c_attn"), "gpt2"),
    ("causal-lm", "sft", {"name": "prefix", "num_virtual_tokens": 2}, "llama"),
    ("sequence-classification", "classification", lora(), "bert"),
    ("sequence-classification", "classification", lora("query", "key", "value", "dense"), "bert"),
    ("sequence-classification", "regression", lora("q_proj"), "llama"),
    ("sequence-classification", "reward", lora(), "llama"),
    ("token-classification", "token-classification", lora("key"), "bert"),
    ("token-classification", "token-classification", {"name": "bitfit"}, "bert"),
    ("seq2seq-lm", "sft", lora("q", "v"), "t5"),
    ("seq2seq-lm", "sft", lora("q_proj", "fc1"), "bart"),
]


@pytest.mark.parametrize(("task", "objective", "method", "kind"), CASES)
def test_the_small_base_is_one_in_which_the_method_finds_its_places(task, objective, method, kind):
    found = recipe.load(written(task, objective, method), smoke=True)
    assert base_and_chat(found, with_weights=False)[0].settings()["model_type"] == kind


def test_a_target_that_none_of_them_has_is_told():
    found = recipe.load(written("causal-lm", "sft", lora("q_prj")), smoke=True)
    with pytest.raises(TargetError, match="q_prj"):
        plan(found, Options(quiet=True))


@pytest.mark.parametrize(("task", "objective", "method", "kind"), [CASES[5], CASES[8], CASES[10], CASES[11]])
def test_the_smoke_run_trains_and_says_what_it_trains_on(task, objective, method, kind, capsys):
    path = written(task, objective, method)
    result = commands.train(path, [], {}, True, False, {})
    assert result["steps"] == 2 and result["merged"]["max_logit_difference"] < 1e-4
    said = f"not/here is not on this machine: a tiny random base of the kind {kind} stands in for it"
    assert said in capsys.readouterr().err
    commands.validate(path, [], True, 0)
    assert f"peftctl: {said}\n" in capsys.readouterr().err
    commands.validate(path, [], True, 0, quiet=True)
    assert said not in capsys.readouterr().err


def test_nothing_stands_in_for_a_base_that_is_here(capsys):
    own = json.loads((runs.CONFIGS / "models" / "tiny-gpt2.json").read_text())
    Path("base").mkdir()
    Path("base/config.json").write_text(json.dumps(own | {"n_layer": 7}))
    path = written("causal-lm", "sft", lora(), "base")
    base = base_and_chat(recipe.load(path, smoke=True), with_weights=False)[0].settings()
    assert (base["model_type"], base["n_layer"]) == ("gpt2", 2)
    commands.validate(path, [], True, 0)
    assert "stands in" not in capsys.readouterr().err
