"""SimPO: the chosen answer's mean log-probability must lead the rejected one's by a margin; there is no reference.

https://arxiv.org/abs/2405.14734
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from peftctl.objectives import _pairs as pairs
from peftctl.objectives.base import Answers, Loss, Objective

if TYPE_CHECKING:
    from peftctl.batch import Batch


class SimpoConfig(pairs.PreferenceConfig):
    beta: float = Field(2.0, gt=0, allow_inf_nan=False, description="what a mean log-probability counts as a reward")
    gamma: float = Field(1.0, ge=0, allow_inf_nan=False, description="by how much the chosen answer's reward must lead")


def loss(policy: Answers, reference: Answers | None, batch: Batch, config: SimpoConfig) -> Loss:
    """Minus the log-sigmoid of margin - gamma, summed over pairs; a reward is beta * mean log(policy)."""
    logprob = policy.tokens(batch).logprob
    rewards = config.beta * pairs.per_row(logprob, batch, mean=True)
    losses = pairs.log_loss(pairs.margins(rewards, batch) - config.gamma)
    return pairs.answer(batch, config, losses, logprob, rewards)


OBJECTIVE = Objective(
    name="simpo",
    summary="make the chosen answer likelier by token, by a margin, without a reference",
    paper="https://arxiv.org/abs/2405.14734",
    config=SimpoConfig,
    kinds=frozenset({"preference"}),
    encode=pairs.encode,
    weights=pairs.weights,
    loss=loss,
    base_dropout=False,
    reports=pairs.reports,
)
