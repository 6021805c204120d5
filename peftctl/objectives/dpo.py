"""Direct preference optimization: the chosen answer gains on the rejected one, measured against a reference.

https://arxiv.org/abs/2305.18290; label smoothing as in https://ericmitchell.ai/cdpo.pdf, the hinge of
https://arxiv.org/abs/2305.10425, the robust loss of https://arxiv.org/abs/2403.00409
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from peftctl.objectives import _pairs as pairs
from peftctl.objectives.base import Answers, Loss, Objective

if TYPE_CHECKING:
    from torch import Tensor

    from peftctl.batch import Batch


class DpoConfig(pairs.ReferenceConfig):
    beta: float = Field(0.1, gt=0, allow_inf_nan=False, description="how strongly the policy is held to the reference")
    loss: Literal["sigmoid", "hinge", "robust"] = Field(
        "sigmoid", description="of a margin; robust: unbiased where the share label_smoothing of the labels is wrong"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs taken to be labelled the wrong way")
    length_normalised: bool = Field(False, description="rewards by the mean over an answer's tokens, not by their sum")

    @model_validator(mode="after")
    def _smoothing_has_a_meaning(self) -> DpoConfig:
        if self.loss == "hinge" and self.label_smoothing:
            raise ValueError("a hinge has no label_smoothing: set it to 0, or loss to sigmoid or robust")
        return self


def loss(policy: Answers, reference: Answers | None, batch: Batch, config: DpoConfig) -> Loss:
    """A loss of the rewards' margin, summed over pairs; a reward is beta * log(policy / reference)."""
    logprob, gained = pairs.gains(policy, reference, batch)
    rewards = config.beta * pairs.per_row(gained, batch, config.length_normalised)
    losses = _losses(pairs.margins(rewards, batch), config)
    return pairs.with_metrics(pairs.answer(batch, config, losses, logprob, rewards), pairs.drift(gained, batch))


def _losses(margins: Tensor, config: DpoConfig) -> Tensor:
    if config.loss == "hinge":
        return (1 - margins).relu()
    share = config.label_smoothing
    # ((1 - e) * -logsigmoid(m) - e * -logsigmoid(-m)) / (1 - 2 e): the smoothed loss of a share below 0
    return pairs.log_loss(margins, -share / (1 - 2 * share) if config.loss == "robust" else share)


def start(config: DpoConfig) -> float | None:
    """The loss of a margin of 0; None where the answers' own is added."""
    if config.sft_weight:
        return None
    return 1.0 if config.loss == "hinge" else math.log(2)  # the smoothed and the robust loss are no others at 0


OBJECTIVE = Objective(
    name="dpo",
    summary="prefer the chosen answer of a pair over the rejected one",
    paper="https://arxiv.org/abs/2305.18290",
    config=DpoConfig,
    kinds=frozenset({"preference"}),
    encode=pairs.encode,
    weights=pairs.weights,
    loss=loss,
    reference=lambda config: config.reference,
    base_dropout=False,
    start=start,
    reports=lambda config: (*pairs.reports(config), "kl"),
)
