"""Token classification: which label each word has, asked at its first token; its other tokens have none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftctl.errors import DataError
from peftctl.objectives import _labels as labels
from peftctl.objectives.base import Encoder, Loss, Objective, Scored, Term
from peftctl.row import Example, Row

if TYPE_CHECKING:
    from peftctl.batch import Batch


class TokenClassificationConfig(labels.LabelsConfig):
    pass


def encode(example: Example, encoder: Encoder, config: TokenClassificationConfig) -> tuple[Row, ...]:
    """One row. Raises DataError for an unknown label, or a word without a token."""
    ids, places = encoder.words(example.texts)
    targets, weights = [0] * len(ids), [0.0] * len(ids)
    for number, (place, answer) in enumerate(zip(places, example.answers, strict=True), 1):
        if answer:
            try:
                targets[place], weights[place] = labels.index(answer, config.labels or ()), 1.0
            except DataError as error:
                raise DataError(f"tag {number}: {error}") from None
    return (Row(ids, tuple(weights), targets=tuple(targets)),)


def weights(batch: Batch, config: TokenClassificationConfig) -> tuple[float, ...]:
    """The number of labelled tokens."""
    return (float(len(batch.labels.target)),)


def loss(policy: Scored, reference: object, batch: Batch, config: TokenClassificationConfig) -> Loss:
    """Cross-entropy of the labelled tokens' scores, summed; metric `accuracy` by token, and the predictions."""
    from torch.nn import functional

    scores, true = policy.token_scores(batch), batch.labels.target
    total = functional.cross_entropy(scores, true, reduction="sum", label_smoothing=config.label_smoothing)
    predicted = scores.detach().argmax(-1)
    right, count = (predicted == true).sum().float(), total.new_tensor(len(true))
    return Loss((Term(total),), {"accuracy": (right, count)}, (predicted, true))


OBJECTIVE = Objective(
    name="token-classification",
    summary="tell which label each word of a text has",
    paper="https://arxiv.org/abs/1810.04805",
    config=TokenClassificationConfig,
    kinds=frozenset({"tagged"}),
    encode=encode,
    weights=weights,
    loss=loss,
    task="token-classification",
    settle=labels.settle,
    judge=labels.quality,
    reports=lambda config: labels.QUALITY,
    labels=lambda config: tuple(config.labels or ()),
    measures=lambda names: {"labels": list(names)} if len(names) > 1 else None,
)
