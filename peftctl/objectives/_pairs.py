"""What the objectives on pairs share: their rows, the sums over an answer, the terms of the loss and the metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from peftctl.errors import DataError
from peftctl.objectives.base import Answers, Encoder, Loss, ObjectiveConfig, Term
from peftctl.row import Example, Row

if TYPE_CHECKING:
    from torch import Tensor, dtype

    from peftctl.batch import Batch

Metrics = dict[str, tuple["Tensor", "Tensor"]]


class PreferenceConfig(ObjectiveConfig):
    sft_weight: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="of the preferred answers' mean loss by token, which is added"
    )


class ReferenceConfig(PreferenceConfig):
    reference: str = Field(
        "initial",
        min_length=1,
        description="initial: the policy at step 0; base; or a folder, of an adapter of the same method or a model",
    )


def encode(example: Example, encoder: Encoder, config: ObjectiveConfig) -> tuple[Row, ...]:
    """Two rows, chosen and rejected, that begin with the same prompt. Raises DataError with the reason.

    Where answers go on for several turns, all that the assistant says in them is learnt, and nothing of the user's.
    """
    before = [message._replace(weight=0.0) for message in example.messages]
    chosen, rejected = (
        Row(*encoder.completion(example.prompt_text, answer), role=role)
        if isinstance(answer, str)
        else Row(*encoder.dialogue((*before, *answer), "assistant", example.tools), role=role)
        for role, answer in (("chosen", example.chosen), ("rejected", example.rejected))
    )
    if chosen.ids == rejected.ids:
        raise DataError("chosen and rejected are the same tokens; a pair must differ")
    return chosen, rejected


def weights(batch: Batch, config: PreferenceConfig) -> tuple[float, ...]:
    """The number of pairs; with `sft_weight`, then the weight of the chosen answers' labels."""
    pairs = float(batch.roles.count("chosen"))
    return (pairs, float(labels_of(batch, "chosen").sum())) if config.sft_weight else (pairs,)


def per_row(values: Tensor, batch: Batch, mean: bool = False) -> Tensor:
    """Values of the labels, (labels,), summed (or averaged) by weight within each row, (rows,)."""
    labels = batch.labels
    sums = values.new_zeros(len(batch.rows)).index_add(0, labels.row, values * labels.weight)
    if not mean:
        return sums
    return sums / labels.weight.new_zeros(len(batch.rows)).index_add(0, labels.row, labels.weight)


def gains(policy: Answers, reference: Answers | None, batch: Batch) -> tuple[Tensor, Tensor]:
    """Per label, (labels,): the policy's log-probability, and by how much it exceeds the reference's."""
    import torch

    assert reference is not None
    logprob = policy.tokens(batch).logprob
    with torch.no_grad():
        against = reference.tokens(batch).logprob
    # differences before sums: equal answers give a margin of exactly 0, in whatever order the device adds
    return logprob, logprob - against


def margins(scores: Tensor, batch: Batch) -> Tensor:
    """Per pair, by how much the chosen answer's score exceeds the rejected one's; `scores`: (rows,)."""
    return scores[batch.role("chosen")] - scores[batch.role("rejected")]


def log_loss(margins: Tensor, smoothing: float = 0.0) -> Tensor:
    """-log sigmoid, a share of `smoothing` of the pairs taken to be labelled the wrong way."""
    from torch.nn import functional

    # (1 - e) * -logsigmoid(m) + e * -logsigmoid(-m), as logsigmoid(-m) = logsigmoid(m) - m
    return smoothing * margins - functional.logsigmoid(margins)


def total(values: Tensor) -> Tensor:
    """The sum, in a dtype in which it does not round: n times ln 2 over n is ln 2."""
    return values.sum(dtype=_exact(values))


def answer(batch: Batch, config: PreferenceConfig, losses: Tensor, logprob: Tensor, rewards: Tensor) -> Loss:
    """The loss of some pairs: `losses` (pairs,), `logprob` (labels,), `rewards` (rows,), with the usual metrics."""
    chosen, rejected = batch.role("chosen"), batch.role("rejected")
    won = rewards[chosen] - rewards[rejected]
    logps = per_row(logprob.detach(), batch)
    pairs = losses.new_tensor(len(losses))
    sums = {
        "loss": total(losses),
        "rewards/chosen": rewards[chosen].sum(),
        "rewards/rejected": rewards[rejected].sum(),
        "rewards/margins": won.sum(),
        "rewards/accuracies": (won > 0).sum().float(),
        "logps/chosen": logps[chosen].sum(),
        "logps/rejected": logps[rejected].sum(),
    }
    found = Loss((Term(total(losses)),), {name: (value.detach(), pairs) for name, value in sums.items()})
    return imitating(found, batch, config.sft_weight, logprob, "chosen")


def reports(config: PreferenceConfig) -> tuple[str, ...]:
    """The names of what `answer` measures beside the loss."""
    rewards = ("chosen", "rejected", "margins", "accuracies")
    found = (*(f"rewards/{name}" for name in rewards), "logps/chosen", "logps/rejected")
    return (*found, "nll_loss") if config.sft_weight else found


def imitating(loss: Loss, batch: Batch, coefficient: float, logprob: Tensor, role: str) -> Loss:
    """The loss and, as a term of its own, the mean loss by token of the answers of that role."""
    if not coefficient:
        return loss
    weight = labels_of(batch, role)
    nll = -(logprob * weight).sum()
    return Loss((*loss.terms, Term(nll, coefficient)), loss.metrics | {"nll_loss": (nll.detach(), weight.sum())})


def drift(gained: Tensor, batch: Batch) -> Metrics:
    """`kl`: how far the policy is from the reference, by token, as if the answers were the reference's own.

    Half the squared log-ratio: never negative, and of little variance (k2 of http://joschu.net/blog/kl-approx.html).
    """
    weight = batch.labels.weight
    return {"kl": ((gained.detach().square() * weight).sum() / 2, weight.sum())}


def with_metrics(loss: Loss, more: Metrics) -> Loss:
    return loss._replace(metrics=loss.metrics | more)


def labels_of(batch: Batch, role: str) -> Tensor:
    """The labels' weights, (labels,), 0 in the rows of other roles."""
    import torch

    return batch.labels.weight * torch.isin(batch.labels.row, batch.role(role))


def _exact(values: Tensor) -> dtype:
    import torch

    return torch.float32 if values.device.type == "mps" else torch.float64
