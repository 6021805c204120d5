"""Early stopping and keeping the best adapter: what is decided, and that a resumed run decides the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftctl import run
from peftctl.errors import RecipeError, Stopped, TrainingError
from peftctl.watch import Watch
from tests import runs

# the held-out answers end as those that are learnt do, and are other words: their loss falls, then rises for good
LEARNT, HELD_OUT = ["red"] * 8, ["sea"] * 4
TRAIN: dict[str, Any] = {"max_steps": 12, "learning_rate": 0.004, "eval_every": 1, "schedule": "constant", "warmup": 0}


Document = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("rows")
    for name, answers in (("train", LEARNT), ("validation", HELD_OUT)):
        rows = [{"prompt": f"{number}: ", "completion": answer} for number, answer in enumerate(answers)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in ("train", "validation")}


@pytest.fixture
def document(files: dict[str, str]) -> Document:
    """A recipe with keys of its block `train`, whose fifth evaluation is the best by far, whatever rounds how."""

    def made(**train: Any) -> dict[str, Any]:
        return runs.document("full", data=files | {"limit": None}, train=TRAIN | train)

    return made


def curve(output: Path) -> list[float]:
    return [event["validation_loss"] for event in runs.events(output) if event["event"] == "evaluation"]


def told(watch: Watch, *values: float) -> list[bool]:
    found = []
    for step, value in enumerate(values, watch.seen + 1):
        watch(step, {watch.metric: value})
        found.append(watch.enough())
    return found


def test_so_many_in_a_row_without_a_better_one_are_enough() -> None:
    watch = Watch(patience=2)
    assert told(watch, 3.0, 2.0, 2.0, 1.0, 1.5, float("nan")) == [False] * 5 + [True]
    assert (watch.step, watch.value) == (4, 1.0)
    assert not any(told(Watch(), *range(9)))


@pytest.mark.parametrize(
    ("metric", "better", "best"),
    [
        ("loss", "auto", 1.0),
        ("validation_absolute_error", "auto", 1.0),
        ("accuracy", "auto", 3.0),
        ("matthews", "lowest", 1.0),
        ("loss", "highest", 3.0),
    ],
)
def test_what_is_better_is_told_by_the_metric(metric: str, better: Any, best: float) -> None:
    watch = Watch(metric, better)
    told(watch, 2.0, 1.0, 3.0)
    assert watch.value == best


def test_a_step_is_judged_once_and_an_unknown_metric_is_told() -> None:
    watch = Watch(patience=1)
    told(watch, 1.0)
    watch(1, {"loss": 0.5})
    assert watch.value == 1.0 and watch.since == 0
    with pytest.raises(
        TrainingError, match=r"train\.best_by: no acuracy is measured; did you mean accuracy\?; there is"
    ):
        Watch("acuracy")(1, {"loss": 1.0, "accuracy": 0.5})


def test_the_adapter_is_that_of_the_best_evaluation(document: Document, tmp_path: Path) -> None:
    result = runs.train(tmp_path / "best", document(keep_best=True), verify=True)
    losses = curve(tmp_path / "best")
    step = losses.index(min(losses)) + 1
    assert 1 < step < len(losses) and result["best"] == {"step": step, "loss": min(losses)}
    assert sorted(losses)[1] - min(losses) > 0.05, "which is the best is a matter of rounding"
    runs.train(tmp_path / "until", document(max_steps=step))
    ours, theirs = runs.adapter(tmp_path / "best"), runs.adapter(tmp_path / "until")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    runs.train(tmp_path / "last", document())
    assert any(not torch.equal(tensor, theirs[name]) for name, tensor in runs.adapter(tmp_path / "last").items())


def test_a_run_ends_early_with_a_checkpoint_and_is_finished(document: Document, tmp_path: Path) -> None:
    result = runs.train(tmp_path / "run", document(early_stopping=2))
    losses = curve(tmp_path / "run")
    best = losses.index(min(losses)) + 1
    assert result["steps"] == best + 2 == len(losses) < TRAIN["max_steps"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{best + 2:06d}").is_dir()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    assert runs.train(tmp_path / "run", document(early_stopping=2), resume=True) == result


@pytest.mark.parametrize("save_every", [1, 3, None])
@pytest.mark.parametrize("stop", [2, 5, 6])
def test_a_stopped_run_decides_as_one_that_was_not(
    stop: int, save_every: int | None, document: Document, tmp_path: Path
) -> None:
    contents = document(early_stopping=2, keep_best=True, save_every=save_every)
    whole = runs.train(tmp_path / "whole", contents)
    assert whole["steps"] > stop or whole["steps"] == stop
    with runs.stopped_after(stop, tmp_path / "cut"), pytest.raises(Stopped):
        runs.train(tmp_path / "cut", contents)
    again = runs.train(tmp_path / "cut", contents, resume=True)
    assert again["best"] == whole["best"] and again["steps"] == whole["steps"]
    for name, tensor in runs.adapter(tmp_path / "whole").items():
        assert torch.equal(tensor, runs.adapter(tmp_path / "cut")[name])
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_killed_after_the_decision_it_is_taken_again(
    document: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = document(early_stopping=2, keep_best=True)
    whole = runs.train(tmp_path / "whole", contents)

    def dying(*_: Any) -> None:
        raise runs.Killed

    with monkeypatch.context() as patch:
        patch.setattr(run, "_write", dying)
        with pytest.raises(runs.Killed):
            runs.train(tmp_path / "cut", contents)
    again = runs.train(tmp_path / "cut", contents, resume=True)
    assert (again["best"], again["steps"]) == (whole["best"], whole["steps"])
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_without_evaluations_there_is_no_best(tmp_path: Path) -> None:
    for key, lacking in (("keep_best", True), ("early_stopping", 1)):
        contents = runs.document(train={key: lacking, "eval_every": None})
        with pytest.raises(RecipeError, match=rf"train\.{key} has no evaluations to compare: set train\.eval_every"):
            runs.loaded(tmp_path / "run", contents)
    contents = runs.document(data={"validation": None}, train={"keep_best": True, "eval_every": None})
    with pytest.raises(RecipeError, match=r"train\.keep_best has no evaluations to compare: set data\.validation"):
        runs.loaded(tmp_path / "run", contents)
