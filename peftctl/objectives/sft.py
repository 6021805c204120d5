"""Supervised fine-tuning: the answers' tokens become likelier, each token weighing the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from peftctl.objectives.base import Answers, Encoder, Loss, Objective, ObjectiveConfig, Term
from peftctl.row import Example, Row

if TYPE_CHECKING:
    from peftctl.batch import Batch


class SftConfig(ObjectiveConfig):
    trained: (
        Literal["assistant", "last", "all"]
        | Annotated[list[Literal["system", "user", "assistant", "tool"]], Field(min_length=1)]
    ) = Field(
        "assistant",
        description="what is learnt: the assistant's turns, its last one, all of the text, or the turns of these roles",
    )

    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of each label that is spread evenly over the vocabulary"
    )


def encode(example: Example, encoder: Encoder, config: SftConfig) -> tuple[Row, ...]:
    """One row. Raises DataError with the reason."""
    if example.kind == "text":
        return (Row(*encoder.text(example.completion)),)
    if example.messages:
        return (Row(*encoder.dialogue(example.messages, config.trained, example.tools)),)
    ids, weights = encoder.completion(example.prompt_text, example.completion)
    return (Row(ids, (1.0,) * len(ids) if config.trained == "all" else weights),)


def weights(batch: Batch, config: SftConfig) -> tuple[float, ...]:
    """The labels' total weight."""
    return (float(batch.labels.weight.sum()),)


def loss(policy: Answers, reference: Answers | None, batch: Batch, config: SftConfig) -> Loss:
    """The labels' negative log-probability, summed by weight; metrics `loss` and `token_accuracy`, by token.

    With label smoothing e (https://arxiv.org/abs/1512.00567, section 7) the loss is (1 - e) of that and e times the
    mean negative log-probability of the vocabulary; `nll_loss` is then what it would be without.
    """
    smoothing, weight = config.label_smoothing, batch.labels.weight
    stats = policy.tokens(batch, mean=True) if smoothing else policy.tokens(batch)
    nll, count = -(stats.logprob * weight).sum(), weight.sum()
    metrics = {"loss": (nll.detach(), count), "token_accuracy": ((stats.correct * weight).sum(), count)}
    if not smoothing:
        return Loss((Term(nll),), metrics)
    assert stats.mean_logprob is not None
    smooth = (1 - smoothing) * nll - smoothing * (stats.mean_logprob * weight).sum()
    return Loss((Term(smooth),), metrics | {"loss": (smooth.detach(), count), "nll_loss": metrics["loss"]})


OBJECTIVE = Objective(
    name="sft",
    summary="learn to give the answers of dialogues or of prompts, or raw text",
    paper="",
    config=SftConfig,
    kinds=frozenset({"messages", "completion", "text"}),
    encode=encode,
    weights=weights,
    loss=loss,
    likelihood=True,
    one_sided=lambda config: (
        None
        if config.trained in ("assistant", "last")
        else "which learns answers alone there: set objective.trained: last"
    ),
)
