"""SIGTERM and SIGINT in every phase of the commands: they end with 143 or 130, and nothing half done is left."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from peftctl import cli, merge, remembered, signals, storage, trainer
from peftctl.data import encoding
from tests import runs
from tests.faults.conftest import Seen
from tests.faults.processes import in_child
from tests.faults.trials import differences

BOTH = (signal.SIGTERM, signal.SIGINT)
# dpo: it has a reference, whose pass over the rows is a phase of its own
CONTENTS = runs.document("lora", "dpo", train={"save_every": 1, "keep": 9})
PHASES: dict[str, tuple[Any, str, int]] = {  # what is called in the phase, and at which call the signal comes
    "tokenisation": (encoding, "encoded", 3),
    "reference pass": (remembered.Remembered, "computed", 1),
    "step": (trainer.Question, "loss", 3),
    "save": (storage, "_write", 9),
    "evaluation": (trainer, "evaluate", 1),
}


def during(owner: Any, name: str, at: int, act: Callable[[], None]) -> None:
    """In this process, from now on: `act` before the call of this number."""
    original, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            act()
        return original(*args, **more)

    setattr(owner, name, wrapped)


def command(*words: object) -> None:
    cli.main(["--quiet", *map(str, words)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTCTL_CACHE", str(folder / "cache"))
        runs.train(folder / "run", CONTENTS)
    return folder / "run"


@pytest.mark.fault(10)
@pytest.mark.parametrize("number", BOTH)
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_of_training_loses_nothing(
    phase: str, number: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "run"

    def work() -> None:
        during(*PHASES[phase], partial(os.kill, os.getpid(), number))
        command("train", runs.written(output, CONTENTS), "--no-verify")

    assert in_child(work) == 128 + number
    assert not (output / "lock").exists()
    assert phase == "tokenisation" or (output / "run.json").exists()
    runs.train(output, CONTENTS, resume=output.exists())
    assert differences(whole, output) == []


@pytest.mark.fault(10)
@pytest.mark.parametrize("phase", ["reference pass", "step", "save", "evaluation"])
def test_a_second_interrupt_does_not_wait(phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path / "cache"))

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
        (tmp_path / "waited").touch()

    def work() -> None:
        during(*PHASES[phase], twice)
        command("train", runs.written(tmp_path / "run", CONTENTS))

    assert in_child(work) == 130 and not (tmp_path / "waited").exists()


@pytest.mark.fault(10, 20)
@pytest.mark.parametrize("number", BOTH)
@pytest.mark.parametrize("phase", ["_copy", "_companions"])
def test_a_signal_in_a_merge_leaves_nothing(phase: str, number: int, trained: Path, tmp_path: Path, seen: Seen) -> None:
    def work() -> None:
        during(merge, phase, 1, partial(os.kill, os.getpid(), number))
        command("merge", trained, "--output", tmp_path / "merged")

    assert in_child(work) == 128 + number
    assert not list(tmp_path.iterdir())
    command_again = in_child(lambda: command("merge", trained, "--output", tmp_path / "merged"))
    assert command_again == 0 and [path.name for path in tmp_path.iterdir()] == ["merged"]
    seen(f"{signal.Signals(number).name}: exit code {128 + number}, no output, nothing aside")


def test_a_second_sigterm_kills() -> None:
    def work() -> None:
        with signals.terminable():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)

    assert in_child(work) == -signal.SIGTERM


def test_whoever_handles_sigterm_already_goes_on_to() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with signals.terminable():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == before
