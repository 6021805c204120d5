"""What a recipe wants to have measured and compared, checked before anything is trained. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from peftctl import metrics, objectives
from peftctl.errors import suggest
from peftctl.objectives.base import ObjectiveConfig
from peftctl.schema import DataConfig, TrainConfig

WATCHED = ("early_stopping", "keep_best")


def faults(
    objective: ObjectiveConfig | None, data: DataConfig | None, train: TrainConfig | None
) -> Iterator[tuple[str, str]]:
    """What is wrong with evaluations, by key, as far as the blocks are right (the others are None)."""
    for key in WATCHED:
        if train and data and getattr(train, key) and (data.validation is None or train.eval_every is None):
            lacking = "data.validation" if data.validation is None else "train.eval_every"
            yield f"train.{key}", f"has no evaluations to compare: set {lacking}"
    if train and data and train.eval_every is not None and data.validation is None:
        yield "train.eval_every", "has nothing to evaluate: set data.validation"
    if train and objective:
        yield from _best_by(train.best_by, objective)
    if data and objective and objectives.get(objective.name).generates(objective) is not None:
        if data.validation is None:
            yield "objective.metrics", "has no held-out rows to answer: set data.validation"
        if data.truncate == "right":
            yield "data.truncate", "right cuts off answers, which objective.metrics compares: left keeps them"


def _best_by(wanted: str, objective: ObjectiveConfig) -> Iterator[tuple[str, str]]:
    known = ("loss", *objectives.get(objective.name).reports(objective))
    name = wanted.removeprefix("validation_")
    if name in known:
        return
    if name in metrics.NAMES and "metrics" in type(objective).model_fields:
        yield "train.best_by", f"is {name}, which is measured where objective.metrics names it: add it there"
        return
    near = suggest(name, known)
    yield "train.best_by", f"is {name}, which {objective.name} does not report{near}; there is {', '.join(known)}"
