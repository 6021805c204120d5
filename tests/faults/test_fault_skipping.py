"""Steps that are passed over because their loss or a gradient is not finite: no update, told, and exact on resume."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peftctl import checkpoint, cli, display, optim
from peftctl.errors import Stopped, TrainingError
from peftctl.objectives.base import Loss
from peftctl.policy import Policy
from peftctl.trainer import Question
from tests import runs
from tests.faults.conftest import Seen
from tests.faults.processes import ended
from tests.test_distributed import ranks, weights
from tests.test_trainer import Run, Shuffled, equal, make, make_rows, values

SKIP = {"on_nan": "skip_step", "max_skipped": 2}
BAD = [math.nan, math.inf, -math.inf]


def poisoned(*steps: int, bad: float = math.nan, where: str = "loss", **more: Any) -> Run:
    """A run whose loss, or one gradient, is not finite at these steps."""
    now: list[int] = []
    run = make(Shuffled(make_rows(10), size=2, accumulate=2), begin=now.append, **more)
    question = run.job.question

    def loss(*args: Any) -> Loss:
        found = question.objective.loss(*args)
        if now[-1] not in steps:
            return found
        return found._replace(terms=(found.terms[0]._replace(sum=found.terms[0].sum * bad),))

    if where == "loss":
        run.job = replace(run.job, question=replace(question, objective=replace(question.objective, loss=loss)))
    else:
        run.policy.head.bias.register_hook(lambda slope: slope * bad if now[-1] in steps else slope)
    return run


def without_update(*steps: int, **more: Any) -> Run:
    """A run in good health, whose optimizer is not asked at these steps."""
    now: list[int] = []
    run = make(Shuffled(make_rows(10), size=2, accumulate=2), begin=now.append, **more)
    step = run.job.optimizer.step
    run.job.optimizer.step = lambda: None if now[-1] in steps else step()  # type: ignore[method-assign,assignment]
    return run


@pytest.mark.fault(41, 42)
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", ["adamw", "sgd", "adafactor"])
def test_a_skipped_step_is_one_without_an_update_and_no_more(where: str, bad: float, kind: str) -> None:
    run, other = poisoned(1, 3, 4, bad=bad, where=where, kind=kind, most_skipped=2), without_update(1, 3, 4, kind=kind)
    assert run.train()[:3] == other.train()[:3]
    assert equal(values(run), values(other))
    ours, theirs = (optim.state(r.job.optimizer, r.job.parameters)[0] for r in (run, other))
    assert equal(ours, theirs)
    assert [event.get("skipped") for event in run.events] == [1, None, 1, 2, None, None, None, None]
    for event, right in zip(run.events, other.events, strict=True):
        assert "skipped" in event or event["loss"] == right["loss"]
        assert {name: event[name] for name in ("step", "lr", "tokens")} == {
            name: right[name] for name in ("step", "lr", "tokens")
        }
    told = run.events[2]
    assert not (math.isfinite(told["loss"]) and math.isfinite(told["grad_norm"]))
    rows = {example for batch in run.job.batches.step(8)[0] for example in batch.examples}
    assert {int(word) for word in told["examples"].split(", ")} == rows


@pytest.mark.fault(41)
def test_more_in_a_row_than_may_be_end_the_run(seen: Seen) -> None:
    run = poisoned(2, 4, 5, 6, most_skipped=2, save_every=1)
    with pytest.raises(TrainingError, match=r"step 6, after 2 skipped steps in a row: the loss is nan") as caught:
        run.train()
    assert [progress.skipped for progress in run.saved] == [0, 1, 0, 1, 2]
    assert run.events[-1]["event"] == "failure"
    seen(caught)


def test_what_watches_the_gradients_hears_of_sound_ones_alone() -> None:
    heard: list[int] = []
    poisoned(3, where="gradient", most_skipped=1, after_backward=lambda step, total: heard.append(step)).train()
    assert heard == [1, 2, 4, 5, 6, 7, 8]


@pytest.mark.fault(42)
def test_every_skipped_step_is_told() -> None:
    stream = io.StringIO()
    lines = display.Lines(1000, stream)
    for step in (2, 3):
        event = {"event": "step", "step": step, "loss": math.nan, "lr": 0.1, "examples": "4, 7"}
        lines(event | ({"skipped": 1} if step == 3 else {}))
    assert stream.getvalue() == "step 3/1000  loss nan  skipped 1  lr 0.1\n"


def spoilt(output: Path, *steps: int) -> pytest.MonkeyPatch:
    """From now on the loss of training is NaN at these steps of the run in a folder."""
    loss, patch = Question.loss, pytest.MonkeyPatch()

    def changed(self: Question, batch: Any) -> Loss:
        found = loss(self, batch)
        if runs.done(output) + 1 not in steps or not any(term.sum.requires_grad for term in found.terms):
            return found
        return found._replace(terms=tuple(term._replace(sum=term.sum * math.nan) for term in found.terms))

    patch.setattr(Question, "loss", changed)
    return patch


@pytest.mark.fault(1, 41)
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_a_run_stopped_among_skipped_steps_goes_on_as_if_not(method: str, tmp_path: Path) -> None:
    contents = runs.document(method, train=SKIP | {"max_steps": 6, "save_every": 1, "keep": 9})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    patch = spoilt(whole, 2, 3)
    result = runs.train(whole, contents)
    patch.undo()
    assert math.isfinite(result["train_loss"]) and result["steps"] == 6
    patch = spoilt(cut, 2, 3)
    for step in (2, 3):
        with runs.stopped_after(step, cut), pytest.raises(Stopped):
            runs.train(cut, contents, resume=step > 2)
    runs.train(cut, contents, resume=True)
    patch.undo()
    assert runs.untimed(cut) == runs.untimed(whole) and runs.bits(cut) == runs.bits(whole)


@pytest.mark.fault(41)
def test_how_many_were_skipped_before_a_stop_is_not_forgotten(tmp_path: Path) -> None:
    output = tmp_path / "run"
    contents = runs.document(train=SKIP | {"max_steps": 6})
    patch = spoilt(output, 2, 3, 4)
    with runs.stopped_after(3, output), pytest.raises(Stopped):
        runs.train(output, contents)
    with pytest.raises(TrainingError, match="step 4, after 2 skipped steps in a row"):
        runs.train(output, contents, resume=True)
    patch.undo()
    runs.train(output, contents, resume=True)  # the rows are sound now: step 4 is done
    assert [event.get("skipped") for event in runs.untimed(output) if event["event"] == "step"] == [
        *(None, 1, 2, None, None, None)
    ]


@pytest.mark.fault(41)
def test_nan_in_one_process_is_skipped_by_all(tmp_path: Path) -> None:
    contents = runs.document(train=SKIP | {"save_every": 1, "keep": 9})
    output, tokens = tmp_path / "run", Policy.tokens
    command = ["train", str(runs.written(output, contents)), "--quiet", "--no-verify"]

    def broken(self: Policy, batch: Any, mean: bool = False) -> Any:
        found = tokens(self, batch, mean)
        return found._replace(logprob=found.logprob * torch.nan) if runs.done(output) == 2 else found

    def member(rank: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(Policy, "tokens", broken)
            cli.main(command)

    assert [ended(child) for child in ranks(2, member)] == [0, 0]
    whole = tmp_path / "whole"
    patch = spoilt(whole, 3)
    runs.train(whole, contents)
    patch.undo()
    assert weights(output) == weights(whole)
    steps = [event.get("skipped") for event in runs.events(output) if event["event"] == "step"]
    assert steps == [None, None, 1, None]
    path = checkpoint.newest(output)
    assert path is not None and all(torch.isfinite(t).all() for t in checkpoint.load(path).adapter.values())
