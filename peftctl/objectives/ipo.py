"""IPO: the chosen answer's lead over the rejected one is drawn to a fixed size, which no pair can make it exceed.

https://arxiv.org/abs/2310.12036
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from peftctl.objectives import _pairs as pairs
from peftctl.objectives.base import Answers, Loss, Objective

if TYPE_CHECKING:
    from peftctl.batch import Batch


class IpoConfig(pairs.ReferenceConfig):
    beta: float = Field(0.1, gt=0, allow_inf_nan=False, description="tau: the lead is drawn to 1 / (2 * beta)")
    length_normalised: bool = Field(
        True, description="leads by the mean over an answer's tokens, as in practice, not by their sum (equation 17)"
    )


def loss(policy: Answers, reference: Answers | None, batch: Batch, config: IpoConfig) -> Loss:
    """The squared distance of the lead in log(policy / reference) from 1 / (2 * beta), summed over pairs."""
    logprob, gained = pairs.gains(policy, reference, batch)
    scores = pairs.per_row(gained, batch, config.length_normalised)
    losses = (pairs.margins(scores, batch) - 1 / (2 * config.beta)).square()
    found = pairs.answer(batch, config, losses, logprob, config.beta * scores)
    return pairs.with_metrics(found, pairs.drift(gained, batch))


OBJECTIVE = Objective(
    name="ipo",
    summary="give the chosen answer of a pair a lead of fixed size",
    paper="https://arxiv.org/abs/2310.12036",
    config=IpoConfig,
    kinds=frozenset({"preference"}),
    encode=pairs.encode,
    weights=pairs.weights,
    loss=loss,
    reference=lambda config: config.reference,
    base_dropout=False,
    reports=lambda config: (*pairs.reports(config), "kl"),
)
