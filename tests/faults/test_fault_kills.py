"""Runs that are killed and stopped at points and moments drawn by a seed; `make soak` does it a thousand times."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from peftctl import checkpoint
from tests import runs
from tests.faults.conftest import Seen
from tests.faults.processes import in_child
from tests.faults.soak import soak, summary
from tests.faults.trials import KINDS, Outcome, differences, trial, whole

EVERY_STEP = runs.document(train={"save_every": 1, "keep": 2})


def assert_nothing_lost(trials: int, folder: Path) -> str:
    outcomes = list(soak(range(trials), folder))
    assert not [outcome for outcome in outcomes if outcome.faults]
    assert sum(outcome.kills for outcome in outcomes) > trials // 2
    return summary(outcomes)


@pytest.mark.fault(10, 11)
def test_a_few_trials_lose_nothing(tmp_path: Path) -> None:
    assert_nothing_lost(2, tmp_path)


@pytest.mark.slow
@pytest.mark.fault(10, 11)
def test_thirty_trials_lose_nothing(tmp_path: Path, seen: Seen) -> None:
    seen(assert_nothing_lost(30, tmp_path))


@pytest.mark.fault(11)
def test_killed_before_the_last_rotation_no_checkpoint_too_many_stays(tmp_path: Path) -> None:
    runs.train(tmp_path / "whole", EVERY_STEP)

    def work() -> None:
        rotate = checkpoint.rotate

        def dying(folder: Path, keep: int) -> None:
            if (folder / "checkpoints" / "step-000004").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            rotate(folder, keep)

        checkpoint.rotate = dying
        runs.train(tmp_path / "run", EVERY_STEP)

    assert in_child(work) == -signal.SIGKILL
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 3
    runs.train(tmp_path / "run", EVERY_STEP, resume=True)
    assert differences(tmp_path / "whole", tmp_path / "run") == []


def test_a_trial_sees_what_is_lost_and_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = whole("job", EVERY_STEP, tmp_path)
    copy = Path(shutil.copytree(job.output, tmp_path / "copy"))
    assert differences(job.output, copy) == []
    (copy / "lock").touch()
    path = copy / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert differences(job.output, copy) == ["adapter/adapter_model.safetensors differs", "lock was left"]
    # a save that only says that it saved
    monkeypatch.setattr(checkpoint, "save", lambda folder, state: checkpoint.folder(folder, state.progress.step))
    outcome = trial(_number_of_kind("save"), job, tmp_path)
    assert outcome.lost and outcome.unequal and outcome.faults


def _number_of_kind(kind: str) -> int:
    return next(number for number in range(99) if random.Random(number).choice(KINDS) == kind)


def test_of_trials_that_failed_nothing_is_hidden() -> None:
    good = Outcome(0, "lora", "point", [-9, 0], 0, False, [])
    text = summary([good, good._replace(lost=2, unequal=True, faults=["step 3 was lost"])])
    assert text == (
        "2 trials, 2 ends by force (exit codes -9: 2, 0: 2); checkpoints lost 2; unequal resumes 1; "
        "trials with any fault 1"
    )
