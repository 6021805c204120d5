"""Every method under every objective, stopped and killed wherever it may be, equals its run that was left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftctl import methods, objectives
from peftctl.errors import Stopped
from tests import runs
from tests.faults.trials import differences

METHODS, OBJECTIVES = tuple(methods.names()), tuple(objectives.names())
# 8 examples, 4 a step: an epoch ends with step 2, the third begins with step 5
ROWS = {"limit": 10, "validation": 0.2}
TRAIN = {"max_steps": 6, "save_every": 1, "keep": 9, "eval_every": 2}
STYLES: dict[str, dict[str, Any]] = {
    "plain": {"data": ROWS, "train": TRAIN},
    # as few micro-batches as hold so many tokens, rows of like length together
    "packed": {"data": ROWS | {"bucket": 2}, "train": TRAIN | {"tokens_per_batch": 120, "weight_decay": 0.1}},
}


def recipe(method: str, objective: str, style: str) -> dict[str, Any]:
    """With dropout where the method has any; what the reference answers is kept on disk from the second epoch on."""
    own = {"dropout": 0.1} if "dropout" in methods.get(method).config.model_fields else {}
    model = {"task": objectives.get(objective).task}
    return runs.document(method, objective, method=own, model=model, **STYLES[style])


def in_pieces(output: Path, contents: dict[str, Any], cuts: tuple[int, ...]) -> None:
    """Stopped after each of these steps, the last one too; after the first, also killed between two micro-batches."""
    for cut in cuts:
        with runs.stopped_after(cut, output), pytest.raises(Stopped, match=f"after step {cut} of 6"):
            runs.train(output, contents, resume=cut > 1)
        if cut == 1:
            with runs.killed_in(1), pytest.raises(runs.Killed):
                runs.train(output, contents, resume=True)
        assert runs.done(output) == cut
    runs.train(output, contents, resume=True)


def assert_exact(method: str, objective: str, style: str, cuts: tuple[int, ...], folder: Path) -> None:
    contents = recipe(method, objective, style)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("whole", "pieces"):
            patch.setenv("PEFTCTL_CACHE", str(folder / f"cache of {name}"))
            train = runs.train if name == "whole" else lambda output, contents: in_pieces(output, contents, cuts)
            train(folder / name, contents)
    assert differences(folder / "whole", folder / "pieces") == []


@pytest.mark.fault(1, 2)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_goes_on_as_if_never_stopped(objective: str, tmp_path: Path) -> None:
    assert_exact("lora", objective, "packed", (1,), tmp_path)


@pytest.mark.slow
@pytest.mark.fault(1, 2)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_as_if_never_stopped(method: str, tmp_path: Path) -> None:
    objective = "classification" if method == "head" else "dpo"
    assert_exact(method, objective, "plain", (1, 3, 6), tmp_path)


@pytest.mark.slow
@pytest.mark.hundreds
@pytest.mark.fault(1, 2)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "method, objective",
    # a task's head alone needs an objective that asks for one
    [(m, o) for m in METHODS for o in OBJECTIVES if m != "head" or objectives.get(o).task != "causal-lm"],
)
def test_every_method_under_every_objective_goes_on_as_if_never_stopped(
    method: str, objective: str, style: str, tmp_path: Path
) -> None:
    assert_exact(method, objective, style, (1, 2, 3, 5, 6), tmp_path)
