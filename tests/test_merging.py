"""The proof of a merge: rounding passes, what answers otherwise does not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from peftctl import merging
from peftctl.base import resolve
from peftctl.errors import PeftctlError
from peftctl.opened import Found
from peftctl.surgery import skeleton
from tests.models import tiny


def difference(error: torch.Tensor, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """The proof of merged files whose logits are 1 too much by `error`."""
    tiny("llama").save_pretrained(folder / "base")
    found = Found(resolve(str(folder / "base")), skeleton(tiny("llama")), None, Path("none"))
    answers = iter([torch.ones_like(error), 1 + error])

    def logits(*arguments: Any) -> torch.Tensor:
        return next(answers)

    monkeypatch.setattr(merging, "_logits", logits)
    return merging._difference([found], folder / "base", False)


def outlier(size: float) -> torch.Tensor:
    error = torch.zeros(1, 24, 1000)
    error[0, 3, 5] = size
    return error


def test_a_single_logit_off_by_rounding_is_told_and_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert difference(outlier(0.5), tmp_path, monkeypatch) == (0.5, 1.0)


@pytest.mark.parametrize("error", [torch.full((1, 24, 1000), 0.12), outlier(float("nan")), outlier(float("inf"))])
def test_other_answers_are_refused(error: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PeftctlError, match="does not answer as base and adapter do"):
        difference(error, tmp_path, monkeypatch)
