"""The profile of a run: where its time went, without a bit of it being different."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftctl import cli, jobs, optim, profile, report, run
from peftctl.data.batches import Batches
from peftctl.errors import Stopped
from peftctl.plan import Options
from peftctl.policy import Policy
from tests import runs

SLOW = 0.05  # seconds


class Time:
    """A time that passes where a test says so, and a microsecond wherever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now

    def slowed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*arguments: Any, **named: Any) -> Any:
            self.now += SLOW
            return function(*arguments, **named)

        return slow


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Time:
    """The time that the program reads: however loaded the machine is, nothing takes long that should not."""
    clock = Time()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> list[profile.Clock]:
    """The clocks of the runs of a test."""
    made: list[profile.Clock] = []

    class Kept(profile.Clock):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            made.append(self)

    monkeypatch.setattr(profile, "Clock", Kept)
    return made


def shares(output: Path, contents: dict[str, Any] | None = None, **options: Any) -> dict[str, float]:
    found: dict[str, float] = runs.train(output, contents or runs.document(), profile=True, **options)["profile"]
    return found


def spans(output: Path, name: str) -> int:
    """How often a part is in the trace."""
    events = json.loads((output / "trace.json").read_text("utf-8"))["traceEvents"]
    return sum(event.get("name") == name and event.get("cat") == "user_annotation" for event in events)


def test_the_shares_are_of_one_whole(tmp_path: Path) -> None:
    found = shares(tmp_path / "run")
    assert tuple(found) == profile.PARTS
    assert sum(found.values()) == pytest.approx(1)
    assert all(share > 0 for share in found.values())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["result"]["profile"] == found


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_nothing_of_the_run_changes(objective: str, tmp_path: Path) -> None:
    contents = runs.document("lora", objective)
    plain = runs.train(tmp_path / "plain", contents)
    assert "profile" not in plain and not (tmp_path / "plain" / "trace.json").exists()
    shares(tmp_path / "profiled", contents)
    assert runs.bits(tmp_path / "profiled") == runs.bits(tmp_path / "plain")
    assert runs.untimed(tmp_path / "profiled") == runs.untimed(tmp_path / "plain")


@pytest.mark.parametrize(
    "part, place, name, calls",
    [
        ("data", Batches, "step", 4),
        ("forward", Policy, "tokens", 8),
        ("backward", torch.Tensor, "backward", 8),
        ("optimizer", torch.optim.AdamW, "step", 4),
        ("other", optim, "scale", 4),
    ],
)
def test_what_is_slow_is_told(
    part: str,
    place: Any,
    name: str,
    calls: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    passing: Time,
    clocks: list[profile.Clock],
) -> None:
    """4 steps of 2 micro-batches each."""
    monkeypatch.setattr(place, name, passing.slowed(getattr(place, name)))
    found = shares(tmp_path / "run")
    assert clocks[0].seconds[part] == pytest.approx(calls * SLOW, rel=0.01)
    assert found[part] == pytest.approx(clocks[0].seconds[part] / sum(clocks[0].seconds.values()))


def test_only_steps_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passing: Time, clocks: list[profile.Clock]
) -> None:
    """The parts add up to the steps' own seconds, however long evaluations, checkpoints and the log take."""
    for place, name in ((Batches, "evaluation"), (jobs, "save"), (report.Log, "__call__")):
        monkeypatch.setattr(place, name, passing.slowed(getattr(place, name)))
    shares(tmp_path / "run", runs.document(train={"save_every": 1, "eval_every": 1}))
    steps = [event["seconds"] for event in runs.events(tmp_path / "run") if event["event"] == "step"]
    # what lies between them takes 16 times SLOW
    assert sum(clocks[0].seconds.values()) == pytest.approx(sum(steps), abs=SLOW)
    assert clocks[0].steps == len(steps) == 4


@pytest.mark.parametrize("steps, first, last", [(1, 1, 1), (2, 1, 2), (4, 2, 4), (5, 3, 5), (80, 3, 5)])
def test_warm_steps_are_traced(steps: int, first: int, last: int) -> None:
    tracer = profile.Tracer(steps)
    assert (tracer.first, tracer.last) == (first, last)


@pytest.mark.parametrize("steps", [1, 6])
def test_the_trace_holds_their_parts(steps: int, tmp_path: Path) -> None:
    shares(tmp_path / "run", runs.document(train={"max_steps": steps, "eval_every": None}))
    traced = min(steps, 3)
    assert [spans(tmp_path / "run", part) for part in ("data", "forward", "backward", "optimizer")] == [
        traced,
        2 * traced,
        2 * traced,
        traced,
    ]


def test_a_stopped_run_tells_what_it_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, contents = tmp_path / "run", runs.document()
    with runs.stopped_after(1, output), pytest.raises(Stopped):
        run.train(runs.loaded(output, contents), Options(profile=True))
    assert "other" in (told := capsys.readouterr().err) and "no step was traced" in told
    assert not (output / "trace.json").exists()
    # the steps of the trace are counted from where the process began
    assert sum(shares(output, contents, resume=True).values()) == pytest.approx(1)
    assert spans(output, "optimizer") == 3


def test_a_trace_that_cannot_be_written_costs_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    (output / "trace.json" / "in the way").mkdir(parents=True)
    run.train(runs.loaded(output, runs.document()), Options(profile=True))
    assert f"{output / 'trace.json'} could not be written" in capsys.readouterr().err
    assert (output / "adapter").is_dir()


def test_the_command_tells_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs.written(tmp_path / "run", runs.document())
    with pytest.raises(SystemExit) as left:
        cli.main(["train", str(path), "--profile", "--json"])
    out, err = capsys.readouterr()
    assert not left.value.code and tuple(json.loads(out)["profile"]) == profile.PARTS
    (line,) = [line for line in err.splitlines() if line.startswith("profile")]
    assert all(part in line for part in profile.PARTS) and str(tmp_path / "run" / "trace.json") in line
