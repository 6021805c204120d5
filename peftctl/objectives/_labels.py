"""What the objectives of a task's head share: the labels there are, the rows, the metrics by the field's libraries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeVar

from pydantic import Field, field_validator

from peftctl.errors import DataError, suggest
from peftctl.imports import undrawn
from peftctl.objectives.base import Encoder, ObjectiveConfig
from peftctl.row import Example, Row, judged

SHOWN = 8  # labels that an error lists
QUALITY = ("accuracy", "f1_macro", "matthews")
AGREEMENT = ("pearson", "spearman")


class LabelsConfig(ObjectiveConfig):
    labels: Annotated[list[str], Field(min_length=2)] | None = Field(
        None, description="the labels' names in the order of the outputs; null: those of data.train, sorted"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the probability that all labels get alike")

    @field_validator("labels")
    @classmethod
    def _once(cls, labels: list[str] | None) -> list[str] | None:
        twice = next((name for name in labels or () if (labels or []).count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice!r} stands there twice")
        return labels


C = TypeVar("C", bound=LabelsConfig)


def settle(config: C, examples: Sequence[Example]) -> C:
    """The labels of some examples where the recipe names none. Raises DataError: fewer than two are no choice."""
    found = {answer for example in examples for answer in example.answers if answer}
    if config.labels is not None or not found:
        return config
    if len(found) == 1:
        raise DataError(f"data.train: every label is {found.pop()!r}; there is nothing to tell apart")
    return config.model_copy(update={"labels": sorted(found, key=_order)})


def _order(name: str) -> tuple[bool, int, str]:
    """Numbers by their size, before all others."""
    return (False, int(name), name) if name.isdecimal() else (True, 0, name)


def index(answer: str, labels: Sequence[str]) -> int:
    """Which label that is, by its name or else its number. Raises DataError."""
    if answer in labels:
        return labels.index(answer)
    if answer.isdecimal() and int(answer) < len(labels):
        return int(answer)
    more = f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
    known = ", ".join(labels[:SHOWN])
    raise DataError(f"label {answer!r} is none of {known}{more}{suggest(answer, labels)}; see objective.labels")


def row(example: Example, encoder: Encoder, target: float) -> tuple[Row, ...]:
    """One row, of which the target is to be said as a whole."""
    ids, types = encoder.texts(*example.texts)
    return (judged(ids, target, types=types),)


def quality(predicted: Sequence[int], true: Sequence[int]) -> dict[str, float]:
    """Of labels by index: accuracy, F1 averaged over the labels that occur, Matthews' correlation."""
    metrics = undrawn("sklearn.metrics")
    one = len({*predicted, *true}) == 1  # nothing that could agree or not
    return {
        "accuracy": float(metrics.accuracy_score(true, predicted)),
        "f1_macro": float(metrics.f1_score(true, predicted, average="macro", zero_division=0.0)),
        "matthews": 0.0 if one else float(metrics.matthews_corrcoef(true, predicted)),
    }


def agreement(predicted: Sequence[float], true: Sequence[float]) -> dict[str, float]:
    """Of numbers: Pearson's and Spearman's correlation; 0 where all numbers are one."""
    stats = undrawn("scipy.stats")
    if min(max(values) - min(values) for values in (predicted, true)) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(stats.pearsonr(predicted, true).statistic),
        "spearman": float(stats.spearmanr(predicted, true).statistic),
    }
