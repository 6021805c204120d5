"""Classification: which of some labels a text has, or a pair of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftctl.objectives import _labels as labels
from peftctl.objectives.base import Encoder, Loss, Objective, Scored, Term
from peftctl.row import Example, Row

if TYPE_CHECKING:
    from peftctl.batch import Batch


class ClassificationConfig(labels.LabelsConfig):
    pass


def encode(example: Example, encoder: Encoder, config: ClassificationConfig) -> tuple[Row, ...]:
    """One row. Raises DataError for an unknown label."""
    return labels.row(example, encoder, labels.index(example.answers[0], config.labels or ()))


def weights(batch: Batch, config: ClassificationConfig) -> tuple[float, ...]:
    """The number of rows."""
    return (float(len(batch.rows)),)


def loss(policy: Scored, reference: object, batch: Batch, config: ClassificationConfig) -> Loss:
    """Cross-entropy of the rows' scores, summed; metric `accuracy`, and the predictions."""
    from torch.nn import functional

    scores, true = policy.row_scores(batch), batch.labels.target
    total = functional.cross_entropy(scores, true, reduction="sum", label_smoothing=config.label_smoothing)
    predicted = scores.detach().argmax(-1)
    right, count = (predicted == true).sum().float(), total.new_tensor(len(true))
    return Loss((Term(total),), {"accuracy": (right, count)}, (predicted, true))


OBJECTIVE = Objective(
    name="classification",
    summary="tell which label a text or a pair of texts has",
    paper="https://arxiv.org/abs/1810.04805",
    config=ClassificationConfig,
    kinds=frozenset({"labelled"}),
    encode=encode,
    weights=weights,
    loss=loss,
    task="sequence-classification",
    settle=labels.settle,
    judge=labels.quality,
    reports=lambda config: labels.QUALITY,
    labels=lambda config: tuple(config.labels or ()),
    measures=lambda names: {"labels": list(names)} if len(names) > 1 else None,
)
