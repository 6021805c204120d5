"""Kahneman-Tversky optimization: single answers, each judged desirable or not, gain or lose against a reference point.

https://arxiv.org/abs/2402.01306. The point is how far the policy is from the reference on answers to other prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from peftctl.errors import DataError
from peftctl.objectives import _pairs as pairs
from peftctl.objectives.base import Answers, Encoder, Loss, Objective, Term
from peftctl.row import Example, Row

if TYPE_CHECKING:
    from torch import Tensor

    from peftctl.batch import Batch

JUDGED = ("desirable", "undesirable")
OTHERS = "mismatched"


class KtoConfig(pairs.ReferenceConfig):
    beta: float = Field(0.1, gt=0, allow_inf_nan=False, description="how strongly the policy is held to the reference")
    desirable_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="of an answer labelled true")
    undesirable_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="of an answer labelled false")


def encode(example: Example, encoder: Encoder, config: KtoConfig) -> tuple[Row, ...]:
    """One row. Raises DataError with the reason."""
    role = JUDGED[0] if example.label else JUDGED[1]
    if example.messages:
        return (Row(*encoder.dialogue(example.messages, "last", example.tools), role=role),)
    return (Row(*encoder.completion(example.prompt_text, example.completion), role=role),)


def pair(examples: Sequence[tuple[Row, ...]], order: Sequence[int]) -> tuple[tuple[Row, ...], ...]:
    """To each example a row of its prompt with the answer of the one before it in that order.

    No row becomes longer than the longest there is: the end of an answer that has no room is cut off.
    """
    if len(examples) < 2:
        raise DataError("one row alone is not enough: the loss also needs answers to other prompts")
    longest = max(len(rows[0].ids) for rows in examples)
    giver = dict(zip(order, (order[-1], *order[:-1]), strict=True))
    return tuple(
        (*rows, _with_answer_of(rows[0], examples[giver[index]][0], longest)) for index, rows in enumerate(examples)
    )


def _with_answer_of(row: Row, other: Row, longest: int) -> Row:
    prompt, start = _prompt(row), _prompt(other)
    ids, weights = (
        (*own[:prompt], *given[start:])[:longest] for own, given in ((row.ids, other.ids), (row.weights, other.weights))
    )
    return Row(ids, weights, row.example, OTHERS)


def _prompt(row: Row) -> int:
    """The number of tokens before the first label."""
    return next(index for index, weight in enumerate(row.weights) if weight)


def weights(batch: Batch, config: KtoConfig) -> tuple[float, ...]:
    """The number of judged answers; with `sft_weight`, then the weight of the desirable ones' labels."""
    judged = float(sum(role in JUDGED for role in batch.roles))
    return (judged, float(pairs.labels_of(batch, JUDGED[0]).sum())) if config.sft_weight else (judged,)


def shared(
    policy: Answers, reference: Answers | None, batches: Iterable[Batch], config: KtoConfig
) -> Mapping[str, Tensor]:
    """`kl`, a scalar: the mean log(policy / reference) of the mismatched answers, at least 0; not differentiated."""
    import torch

    total, count = torch.zeros(()), 0
    for batch in batches:
        own = batch.only(OTHERS)
        if own.rows:
            _, gained = pairs.gains(policy, reference, own)
            total = pairs.total(pairs.per_row(gained, own)) + total.to(gained.device)
            count += len(own.rows)
    return {"kl": (total / max(count, 1)).clamp(min=0)}


def loss(
    policy: Answers, reference: Answers | None, batch: Batch, config: KtoConfig, shared: Mapping[str, Tensor]
) -> Loss:
    """1 - sigmoid(beta * lead), by weight, summed over answers.

    A desirable answer leads by log(policy / reference) - kl, an undesirable one by the opposite.
    """
    import torch

    batch, kl = batch.only(*JUDGED), shared["kl"]
    logprob, gained = pairs.gains(policy, reference, batch)
    gains, logps = pairs.per_row(gained, batch), pairs.per_row(logprob.detach(), batch)
    rows = [batch.role(role) for role in JUDGED]
    leads = [config.beta * sign * (gains[own] - kl) for own, sign in zip(rows, (1, -1), strict=True)]
    factors = (config.desirable_weight, config.undesirable_weight)
    total = pairs.total(torch.cat([f * torch.sigmoid(-lead) for f, lead in zip(factors, leads, strict=True)]))
    metrics = {}
    for name, own in zip(("chosen", "rejected"), rows, strict=True):
        count = gains.new_tensor(len(own))
        metrics[f"rewards/{name}"] = (config.beta * gains[own].detach().sum(), count)
        metrics[f"logps/{name}"] = (logps[own].sum(), count)
    judged = gains.new_tensor(len(batch.rows))
    right = (torch.cat(leads).detach() > 0).sum().float()
    metrics |= {"loss": (total.detach(), judged), "rewards/accuracies": (right, judged), "kl": (kl * judged, judged)}
    return pairs.imitating(Loss((Term(total),), metrics), batch, config.sft_weight, logprob, JUDGED[0])


OBJECTIVE = Objective(
    name="kto",
    summary="make answers judged good likelier and those judged bad less likely",
    paper="https://arxiv.org/abs/2402.01306",
    config=KtoConfig,
    kinds=frozenset({"unpaired"}),
    encode=encode,
    weights=weights,
    loss=loss,
    reference=lambda config: config.reference,
    base_dropout=False,
    reports=lambda config: (*(name for name in pairs.reports(config) if name != "rewards/margins"), "kl"),
    pair=pair,
    shared=shared,
)
