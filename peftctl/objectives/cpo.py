"""Contrastive preference optimization: DPO without a reference, and the chosen answers are learnt besides.

https://arxiv.org/abs/2401.08417
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from peftctl.objectives import _pairs as pairs
from peftctl.objectives.base import Answers, Loss, Objective

if TYPE_CHECKING:
    from peftctl.batch import Batch


class CpoConfig(pairs.PreferenceConfig):
    beta: float = Field(0.1, gt=0, allow_inf_nan=False, description="what a log-probability counts in the margin")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs taken to be labelled the wrong way")
    sft_weight: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="of the preferred answers' mean loss by token, which is added"
    )


def loss(policy: Answers, reference: Answers | None, batch: Batch, config: CpoConfig) -> Loss:
    """Minus the log-sigmoid of the rewards' margin, summed over pairs; a reward is beta * log(policy)."""
    logprob = policy.tokens(batch).logprob
    rewards = config.beta * pairs.per_row(logprob, batch)
    losses = pairs.log_loss(pairs.margins(rewards, batch), config.label_smoothing)
    return pairs.answer(batch, config, losses, logprob, rewards)


OBJECTIVE = Objective(
    name="cpo",
    summary="prefer the chosen answer and learn to give it, without a reference",
    paper="https://arxiv.org/abs/2401.08417",
    config=CpoConfig,
    kinds=frozenset({"preference"}),
    encode=pairs.encode,
    weights=pairs.weights,
    loss=loss,
    base_dropout=False,
    reports=pairs.reports,
)
