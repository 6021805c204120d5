"""A reward model: the chosen answer of a pair scores higher than the rejected one (Bradley and Terry).

https://arxiv.org/abs/2203.02155, section 3.5; the centring of https://arxiv.org/abs/2312.09244.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from peftctl.objectives import _pairs as pairs
from peftctl.objectives.base import Encoder, Loss, Objective, ObjectiveConfig, Scored, Term
from peftctl.row import Example, Row, judged

if TYPE_CHECKING:
    from peftctl.batch import Batch


class RewardConfig(ObjectiveConfig):
    center_rewards: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="weight of the squared sum of a pair's scores: draws them around 0"
    )


def encode(example: Example, encoder: Encoder, config: RewardConfig) -> tuple[Row, ...]:
    """Two rows, chosen and rejected, each scored at its last token. Raises DataError with the reason."""
    return tuple(judged(row.ids, role=row.role) for row in pairs.encode(example, encoder, config))


def weights(batch: Batch, config: RewardConfig) -> tuple[float, ...]:
    """The number of pairs; with `center_rewards`, once more."""
    number = float(batch.roles.count("chosen"))
    return (number, number) if config.center_rewards else (number,)


def loss(policy: Scored, reference: object, batch: Batch, config: RewardConfig) -> Loss:
    """-log sigmoid of the scores' margin, summed over pairs; metrics `accuracy`, `margin` and `mean_score`."""
    scores = policy.row_scores(batch)[:, 0]
    margins = pairs.margins(scores, batch)
    losses = pairs.log_loss(margins)
    terms = [Term(pairs.total(losses))]
    if config.center_rewards:
        both = scores[batch.role("chosen")] + scores[batch.role("rejected")]
        terms.append(Term(pairs.total(both.square()), config.center_rewards))
    count, rows = losses.new_tensor(len(losses)), scores.new_tensor(len(scores))
    sums = {"accuracy": ((margins > 0).sum().float(), count), "margin": (margins.sum(), count)}
    sums["mean_score"] = (scores.sum(), rows)
    return Loss(tuple(terms), {name: (total.detach(), n) for name, (total, n) in sums.items()})


OBJECTIVE = Objective(
    name="reward",
    summary="score answers, the chosen one of a pair above the rejected one",
    paper="https://arxiv.org/abs/2203.02155",
    config=RewardConfig,
    kinds=frozenset({"preference"}),
    encode=encode,
    weights=weights,
    loss=loss,
    base_dropout=False,
    task="sequence-classification",
    reports=lambda config: ("accuracy", "margin", "mean_score"),
    labels=lambda config: ("reward",),
    measures=lambda labels: {} if len(labels) == 1 else None,
)
