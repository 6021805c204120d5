"""Direct preference optimization: the chosen answer gains on the rejected one, measured against a reference.

https://arxiv.org/abs/2305.18290; label smoothing as in https://ericmitchell.ai/cdpo.pdf
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from peftctl.objectives.base import Answers, Encoder, Loss, Objective, ObjectiveConfig, Term
from peftctl.row import Example, Row

if TYPE_CHECKING:
    from torch import Tensor, dtype

    from peftctl.batch import Batch


class DpoConfig(ObjectiveConfig):
    beta: float = Field(0.1, gt=0, allow_inf_nan=False, description="how strongly the policy is held to the reference")
    reference: Literal["initial", "base"] = Field("initial", description="the policy as it was at step 0, or the base")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of pairs taken to be labelled the wrong way")


def encode(example: Example, encoder: Encoder, config: DpoConfig) -> tuple[Row, ...]:
    """Two rows, chosen and rejected, that begin with the same prompt. Raises DataError with the reason."""
    pair = (("chosen", example.chosen), ("rejected", example.rejected))
    return tuple(
        Row(*encoder.completion(example.prompt_text, answer), role=role)
        if isinstance(answer, str)
        else Row(*encoder.dialogue((*example.messages, *answer), "last"), role=role)
        for role, answer in pair
    )


def weights(batch: Batch, config: DpoConfig) -> tuple[float, ...]:
    """The number of pairs."""
    return (float(batch.roles.count("chosen")),)


def loss(policy: Answers, reference: Answers | None, batch: Batch, config: DpoConfig) -> Loss:
    """Minus the log-sigmoid of the rewards' margin, summed over pairs; a reward is beta * log(policy / reference)."""
    import torch
    from torch.nn import functional

    assert reference is not None
    logprob = policy.tokens(batch).logprob
    with torch.no_grad():
        against = reference.tokens(batch).logprob
    # differences first: equal answers give a margin of exactly 0, in whatever order the device adds
    rewards = config.beta * _per_row(logprob - against, batch)
    logps = _per_row(logprob.detach(), batch)
    chosen, rejected = batch.role("chosen"), batch.role("rejected")
    margins = rewards[chosen] - rewards[rejected]
    # (1 - e) * -logsigmoid(m) + e * -logsigmoid(-m), as logsigmoid(-m) = logsigmoid(m) - m
    losses = config.label_smoothing * margins - functional.logsigmoid(margins)
    total = losses.sum(dtype=_exact(losses))
    metrics = {
        "loss": total,
        "rewards/chosen": rewards[chosen].sum(),
        "rewards/rejected": rewards[rejected].sum(),
        "rewards/margins": margins.sum(),
        "rewards/accuracies": (margins > 0).sum().float(),
        "logps/chosen": logps[chosen].sum(),
        "logps/rejected": logps[rejected].sum(),
    }
    pairs = losses.new_tensor(len(losses))
    return Loss((Term(total),), {name: (value.detach(), pairs) for name, value in metrics.items()})


def _per_row(values: Tensor, batch: Batch) -> Tensor:
    """Values of the labels, (labels,), summed by weight within each row, (rows,)."""
    sums = values.new_zeros(len(batch.rows))
    return sums.index_add(0, batch.labels.row, values * batch.labels.weight)


def _exact(values: Tensor) -> dtype:
    """A dtype in which a sum over pairs does not round: n times ln 2 over n is ln 2."""
    import torch

    return torch.float32 if values.device.type == "mps" else torch.float64


OBJECTIVE = Objective(
    name="dpo",
    summary="prefer the chosen answer of a pair over the rejected one",
    paper="https://arxiv.org/abs/2305.18290",
    config=DpoConfig,
    kinds=frozenset({"preference"}),
    encode=encode,
    weights=weights,
    loss=loss,
    reference=lambda config: config.reference,
    base_dropout=False,
)
