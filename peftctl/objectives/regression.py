"""Regression: the number that a text has, or a pair of texts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from peftctl.errors import DataError
from peftctl.objectives import _labels as labels
from peftctl.objectives.base import Encoder, Loss, Objective, ObjectiveConfig, Scored, Term
from peftctl.row import Example, Row

if TYPE_CHECKING:
    from peftctl.batch import Batch


class RegressionConfig(ObjectiveConfig):
    pass


def encode(example: Example, encoder: Encoder, config: RegressionConfig) -> tuple[Row, ...]:
    """One row. Raises DataError for what is no number."""
    return labels.row(example, encoder, _number(example.answers[0]))


def _number(answer: str) -> float:
    try:
        value = float(answer)
    except ValueError:
        raise DataError(f"label {answer!r} is no number; objective classification tells names apart") from None
    if not math.isfinite(value):
        raise DataError(f"label {answer!r} is not finite")
    return value


def weights(batch: Batch, config: RegressionConfig) -> tuple[float, ...]:
    """The number of rows."""
    return (float(len(batch.rows)),)


def loss(policy: Scored, reference: object, batch: Batch, config: RegressionConfig) -> Loss:
    """Squared error of the rows' scores, summed; metric `absolute_error`, and the predictions."""
    scores, true = policy.row_scores(batch)[:, 0], batch.labels.target
    error = scores - true
    absolute = (error.detach().abs().sum(), error.new_tensor(len(true)))
    return Loss((Term(error.square().sum()),), {"absolute_error": absolute}, (scores.detach(), true))


OBJECTIVE = Objective(
    name="regression",
    summary="tell the number that a text or a pair of texts has",
    paper="https://arxiv.org/abs/1810.04805",
    config=RegressionConfig,
    kinds=frozenset({"labelled"}),
    encode=encode,
    weights=weights,
    loss=loss,
    task="sequence-classification",
    judge=labels.agreement,
    reports=lambda config: ("absolute_error", *labels.AGREEMENT),
    labels=lambda config: ("value",),
    measures=lambda names: {} if len(names) == 1 else None,
)
