"""One trial: a run that is killed or stopped, gone on with to the end, and compared with one that was left alone.

This process has imported torch; each run is a fork of it, so that a trial costs about a second.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from peftctl import checkpoint, cli
from peftctl.errors import FormatError
from tests import runs
from tests.faults.processes import Kill, Watched, in_child, watched
from tests.test_checkpoint import POINTS

KINDS = ("point", "save", "time", "SIGTERM", "SIGINT")
MOST_KILLS = 3  # of one trial
STEPS = 5
Tell = Callable[[str], Any]


def jobs() -> dict[str, dict[str, Any]]:
    """Recipes that draw on all there is: generators, several kinds of adapters, references, orders of rows."""
    documents = {
        "lora": runs.document("lora", "sft", method={"dropout": 0.1}),
        "dpo": runs.document("lora", "dpo", method={"dropout": 0.1}),
        "kto": runs.document("bottleneck", "kto"),
        "prefix": runs.document("prefix", "dpo"),
        "adalora": runs.document("adalora", "sft", train={"tokens_per_batch": 96}),
        "full": runs.document("full", "orpo", data={"bucket": 2}, method={"last_layers": 1}),
    }
    often = {"save_every": 1, "keep": 2, "max_steps": STEPS}
    return {name: contents | {"train": contents["train"] | often} for name, contents in documents.items()}


class Whole(NamedTuple):
    """A job that nothing happened to."""

    name: str
    contents: dict[str, Any]
    output: Path
    calls: int  # of what touches the disk for good
    seconds: float


class Outcome(NamedTuple):
    """What became of a trial. `faults` is empty when nothing was lost and all bits are equal."""

    number: int
    job: str
    kind: str
    ends: list[int]  # exit codes of the runs that were to be ended, negative for a signal
    lost: int  # checkpoints that had been reported as saved and were not whole afterwards
    unequal: bool
    faults: list[str]

    @property
    def kills(self) -> int:
        return sum(code != 0 for code in self.ends)


def whole(name: str, contents: dict[str, Any], folder: Path) -> Whole:
    """Run a job to its end."""
    output, calls = folder / name, list[str]()
    with _cache(folder / f"{name}-cache"), pytest.MonkeyPatch.context() as patch:
        _wrap(patch, lambda: calls.append(""), lambda: None)
        begun = time.perf_counter()
        runs.train(output, contents)
    return Whole(name, contents, output, len(calls), time.perf_counter() - begun)


def trial(number: int, job: Whole, folder: Path) -> Outcome:
    """The trial of this number, which is its seed, in a folder of its own."""
    chance = random.Random(number)
    kind, output, faults, ends = chance.choice(KINDS), folder / "run", list[str](), list[int]()
    saved = lost = 0
    with _cache(folder / "cache"):
        for _ in range(chance.randint(1, MOST_KILLS)):
            code, lines = _attempt(job, output, kind, chance)
            ends.append(code)
            if not _allowed(kind, code):
                faults.append(f"{kind} ended the run with {code}")
            saved = max([saved, *(int(line.split()[1]) for line in lines if line.startswith("saved "))])
            missing = _missing(output, saved)
            lost += len(missing)
            faults += missing
            if code == 0:
                break
        if ends[-1] != 0 and (code := in_child(lambda: _train(job, output))) != 0:
            faults.append(f"the run could not be gone on with: it ended with {code}")
    unequal = differences(job.output, output)
    return Outcome(number, job.name, kind, ends, lost, bool(unequal), faults + unequal)


def differences(expected: Path, found: Path) -> list[str]:
    """What of a run is not as in the run that was left alone, and what a crash left lying about."""
    try:
        unequal = ["the log differs"] if runs.untimed(expected) != runs.untimed(found) else []
        ours, theirs = runs.bits(expected), runs.bits(found)
    except OSError as error:
        return [f"cannot be compared: {error}"]
    unequal += [f"{name} differs" for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    left = [path for path in found.rglob("*") if path.name.startswith((".tmp-", ".old-")) or path.name == "lock"]
    return unequal + [f"{path.name} was left" for path in left]


def _attempt(job: Whole, output: Path, kind: str, chance: random.Random) -> Watched:
    if kind == "point":
        at, after = chance.randint(1, job.calls), chance.random() < 0.5
        return watched(lambda tell: _dies_at(job, output, tell, at, after))
    if kind == "save":
        kill = Kill(signal.SIGKILL, chance.expovariate(200), f"saving {chance.randint(1, STEPS)}")
        return watched(lambda tell: _train(job, output, tell), kill)
    number = signal.SIGKILL if kind == "time" else signal.Signals[kind]
    return watched(lambda tell: _train(job, output, tell), Kill(number, chance.uniform(0, 1.1 * job.seconds)))


def _allowed(kind: str, code: int) -> bool:
    """Whether a run may end so: it was done before, or it ended by that signal, caught or not yet."""
    if kind in ("SIGTERM", "SIGINT"):
        return code in (0, 128 + signal.Signals[kind], -signal.Signals[kind])
    return code in (0, -signal.SIGKILL)


def _train(job: Whole, output: Path, tell: Tell = lambda line: None) -> None:
    """The command, which goes on with what is there; each save is told when it begins and when it is done."""
    save = checkpoint.save

    def told(folder: Path, state: checkpoint.State) -> Path:
        tell(f"saving {state.progress.step}")
        path = save(folder, state)
        tell(f"saved {state.progress.step}")
        return path

    checkpoint.save = told  # a fork, which ends with this
    command = ["--quiet", "train", str(runs.written(output, job.contents)), "--no-verify"]
    cli.main(command + (["--resume"] if (output / "run.json").exists() else []))


def _dies_at(job: Whole, output: Path, tell: Tell, at: int, after: bool) -> None:
    """Killed before or after the call number `at` of those that touch the disk."""
    calls = [0, 0]

    def count(side: int) -> None:
        calls[side] += 1
        if calls[side] == at and side == after:
            os.kill(os.getpid(), signal.SIGKILL)

    _wrap(pytest.MonkeyPatch(), lambda: count(0), lambda: count(1))
    _train(job, output, tell)


def _wrap(patch: pytest.MonkeyPatch, before: Callable[[], None], after: Callable[[], None]) -> None:
    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **more: Any) -> Any:
            before()
            result = original(*args, **more)
            after()
            return result

        patch.setattr(owner, name, wrapped)

    for owner, name in POINTS:
        wrap(owner, name)


def _missing(output: Path, saved: int) -> list[str]:
    """What is not there of the newest two checkpoints, the later of which was saved, or is not whole."""
    parent = output / "checkpoints"
    there = {path.name for path in parent.glob("step-*")}
    held = {int(name[-6:]) for name in there | {path.name for path in parent.glob(".old-step-*")}}
    newest = max([saved, *held])
    faults = [f"step {step} was lost" for step in (newest - 1, newest) if 0 < step and step not in held]
    for name in sorted(there):
        try:
            checkpoint.verify(parent / name)
        except FormatError as error:
            faults.append(str(error))
    return faults


@contextmanager
def _cache(folder: Path) -> Iterator[None]:
    """What is kept between runs is this trial's own, so that computing it is part of the trial."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTCTL_CACHE", str(folder))
        yield
    shutil.rmtree(folder, ignore_errors=True)
