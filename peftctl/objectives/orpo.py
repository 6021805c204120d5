"""ORPO: the chosen answers are learnt, and their odds raised over those of the rejected ones, without a reference.

https://arxiv.org/abs/2403.07691
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from peftctl.objectives import _pairs as pairs
from peftctl.objectives.base import Answers, Loss, Objective

if TYPE_CHECKING:
    from torch import Tensor

    from peftctl.batch import Batch


class OrpoConfig(pairs.PreferenceConfig):
    beta: float = Field(0.1, gt=0, allow_inf_nan=False, description="lambda: the weight of the odds ratio's loss")
    sft_weight: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="of the preferred answers' mean loss by token, which is added"
    )


def loss(policy: Answers, reference: Answers | None, batch: Batch, config: OrpoConfig) -> Loss:
    """Minus beta times the log-sigmoid of the log odds ratio (equations 4 and 7), summed over pairs."""
    logprob = policy.tokens(batch).logprob
    means = pairs.per_row(logprob, batch, mean=True)
    ratios = pairs.margins(_log_odds(means), batch)
    found = pairs.answer(batch, config, config.beta * pairs.log_loss(ratios), logprob, config.beta * means)
    return pairs.with_metrics(found, {"log_odds_ratio": (ratios.detach().sum(), ratios.new_tensor(len(ratios)))})


def _log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p."""
    import torch

    # a probability that rounds to 1 would have infinite odds
    below = logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
    return below - (-torch.expm1(below)).log()


OBJECTIVE = Objective(
    name="orpo",
    summary="learn the chosen answer and raise its odds over the rejected one's, without a reference",
    paper="https://arxiv.org/abs/2403.07691",
    config=OrpoConfig,
    kinds=frozenset({"preference"}),
    encode=pairs.encode,
    weights=pairs.weights,
    loss=loss,
    base_dropout=False,
    reports=lambda config: (*pairs.reports(config), "log_odds_ratio"),
)
