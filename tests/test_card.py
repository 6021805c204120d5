"""Whole runs on a CUDA card: what they learn is what the CPU learns, and a stopped one goes on. `pytest -m gpu`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from peftctl import cli
from peftctl.errors import Stopped
from tests import runs

pytestmark = pytest.mark.gpu

CARD = "cuda"
JOBS = [(name, "sft") for name in runs.names()] + [("lora", objective) for objective in ("dpo", "kto", "orpo", "grpo")]


def losses(output: Path, contents: dict[str, Any], device: str) -> list[float]:
    contents["train"] |= {"device": device}
    runs.train(output, contents, verify=True)
    return [event["loss"] for event in runs.events(output) if event["event"] == "step"]


@pytest.mark.parametrize(("method", "objective"), JOBS)
def test_learns_what_the_cpu_learns(method: str, objective: str, tmp_path: Path) -> None:
    # drawn answers would differ where two tokens are about as likely
    steps = 1 if objective == "grpo" else 4
    found = []
    for device in ("cpu", CARD):
        contents = runs.document(method, objective, train={"max_steps": steps})
        found.append(losses(tmp_path / device, contents, device))
    assert found[1] == pytest.approx(found[0], rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("layout", [{}, {"share_starts": False}], ids=["shared", "joined"])
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "plain"])
def test_half_precision_stays_near_and_learns(layout: dict[str, Any], fuse: bool, tmp_path: Path) -> None:
    contents = runs.document(data=layout, train={"max_steps": 12, "eval_every": None, "fuse": fuse})
    contents["model"]["dtype"] = "bfloat16"
    found = losses(tmp_path / "run", contents, CARD)
    assert all(map(math.isfinite, found)) and found[-1] < found[0]


def test_the_first_preference_loss_is_ln_2(tmp_path: Path) -> None:
    assert runs.even(losses(tmp_path / "run", runs.document("lora", "dpo"), CARD)[0])


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    contents = runs.document()
    whole = losses(tmp_path / "whole", contents, CARD)
    with pytest.raises(Stopped), runs.stopped_after(2, tmp_path / "parts"):
        losses(tmp_path / "parts", contents, CARD)
    runs.train(tmp_path / "parts", contents, resume=True)
    again = [event["loss"] for event in runs.events(tmp_path / "parts") if event["event"] == "step"]
    assert again == pytest.approx(whole, rel=1e-4)


def test_the_commands_answer_and_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses(tmp_path / "run", runs.document(), CARD)
    for command in (
        ["generate", str(tmp_path / "run"), "--prompt", "Who?", "--max-new-tokens", "4", "--device", CARD],
        ["eval", str(tmp_path / "run"), "--data", str(runs.data("sft")), "--device", CARD],
        ["merge", str(tmp_path / "run" / "adapter"), "--output", str(tmp_path / "merged")],
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(["--quiet", *command, "--json"])
        assert left.value.code == 0 and json.loads(capsys.readouterr().out)
