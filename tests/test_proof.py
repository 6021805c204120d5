"""After training, proof: on by default, its cost told; what moved nothing or was written wrongly ends with 1."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftctl import cli
from peftctl.methods.attachment import Attachment
from tests import runs


def command(path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[Any, str, str]:
    """Exit code, stdout and stderr of a training command."""
    capsys.readouterr()
    code: Any = 0
    try:
        cli.main(["--quiet", "train", str(path), "--json", *words])
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


def test_it_is_made_unless_it_is_left_out_and_says_what_it_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs.written(tmp_path / "run", runs.document())
    proof = json.loads(command(path, capsys)[1])["proof"]
    assert proof["moved"] == 4 and proof["max_difference"] == 0 and proof["seconds"] > 0
    assert json.loads(command(path, capsys, "--no-verify", "--output", str(tmp_path / "bare"))[1])["proof"] is None


def test_what_moved_nothing_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate below the last digit of what is trained; of few steps, so that nothing else sees it."""
    path = runs.written(tmp_path / "run", runs.document("prefix", train={"learning_rate": 1e-30}))
    code, out, err = command(path, capsys)
    assert code == 1 and out == ""
    assert err == (
        "peftctl: error: training changed no parameter: the learning rate may be too small, "
        "or no label depends on the adapter\n"
    )
    assert command(path, capsys, "--no-verify", "--output", str(tmp_path / "bare"))[0] == 0


@pytest.mark.parametrize("spoil", [lambda t: t * 1.5, lambda t: t * math.nan, torch.zeros_like])
def test_a_file_that_answers_otherwise_ends_with_1(
    spoil: Callable[[torch.Tensor], torch.Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = Attachment.written
    monkeypatch.setattr(Attachment, "written", lambda self: {n: spoil(t) for n, t in written(self).items()})
    code, out, err = command(runs.written(tmp_path / "run", runs.document()), capsys)
    assert code == 1 and out == "" and len(err.splitlines()) == 1
    assert "adapter does not give the trained answers: they differ by " in err
