"""The loss on a file is the mean over labelled tokens, as anyone can compute it from the logits."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch

from peftctl import evaluation, objectives, opened
from peftctl.data.batches import each_once
from peftctl.data.dataset import load
from peftctl.errors import DataError, ModelError
from peftctl.evaluation import evaluate
from peftctl.opened import Opened
from tests import runs

DATA = runs.CONFIGS / "data" / "messages.jsonl"


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("evaluation") / "run"
    runs.train(output, runs.document())
    return output


def _open(path: Path) -> Opened:
    return opened.open(opened.find(str(path)), device="cpu")


@torch.no_grad()
def _by_hand(thing: Opened) -> tuple[float, int]:
    """One row after the other, through the plain model."""
    objective = objectives.get("sft")
    dataset, _ = load(DATA, thing.chat, objective, objective.config(name="sft"))
    total, weight = 0.0, 0.0
    for row in dataset.rows(range(len(dataset))):
        ids = torch.tensor(row.ids)
        logits = thing.policy.model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        weights = torch.tensor(row.weights[1:], dtype=torch.float64)
        total -= float((logits[:-1].gather(1, ids[1:, None])[:, 0] * weights).sum())
        weight += float(weights.sum())
    return total / weight, int(weight)


@pytest.mark.parametrize("part", ["", "adapter", "base"])
def test_a_run_an_adapter_and_a_model_are_measured(part: str, output: Path) -> None:
    thing = _open(output / part)
    loss, tokens = _by_hand(thing)
    found = evaluate(thing, DATA)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found["tokens"] == tokens


def test_the_size_of_micro_batches_changes_nothing(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, steps = [], []
    for tokens in (1, 250, 4096):
        monkeypatch.setattr(evaluation, "each_once", functools.partial(each_once, tokens=tokens))
        seen: list[tuple[int, int]] = []
        found.append(evaluate(_open(output), DATA, progress=lambda *place, seen=seen: seen.append(place)))
        steps.append(seen)
    examples = len(DATA.read_text().splitlines())
    assert steps[0] == [(done, examples) for done in range(1, examples + 1)]
    assert all(seen[-1] == (examples, examples) for seen in steps) and len(steps[0]) > len(steps[1]) > len(steps[2])
    assert all(found[0] == pytest.approx(other, rel=1e-5) for other in found[1:])
    assert found[0]["token_accuracy"] == found[2]["token_accuracy"]


def test_training_lowers_the_loss(output: Path) -> None:
    assert evaluate(_open(output), DATA)["loss"] < evaluate(_open(output / "base"), DATA)["loss"]


def test_pairs_are_refused(output: Path) -> None:
    with pytest.raises(DataError, match="holds preference pairs"):
        evaluate(_open(output), runs.CONFIGS / "data" / "preference.jsonl")


def test_a_run_without_a_result_says_so(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"status": "stopped"}')
    with pytest.raises(ModelError, match=r"without a result \(stopped\): finish it with"):
        opened.find(str(tmp_path))
