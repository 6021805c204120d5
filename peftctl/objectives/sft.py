"""Supervised fine-tuning: the answers' tokens become likelier, each token weighing the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from peftctl import metrics
from peftctl.objectives.base import Answers, Encoder, Generated, Loss, Objective, ObjectiveConfig, Term
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
    metrics: list[str] = Field(
        [],
        description=f"of the answers to held-out prompts, which are then generated: {', '.join(metrics.NAMES)}",
        json_schema_extra={"items": {"type": "string", "enum": list(metrics.NAMES)}},
    )
    max_new_tokens: int = Field(128, ge=1, description="most tokens of an answer that is generated")

    @field_validator("metrics")
    @classmethod
    def _measurable(cls, names: list[str]) -> list[str]:
        if faults := [fault for fault in map(metrics.fault, names) if fault is not None]:
            raise ValueError(faults[0])
        return list(dict.fromkeys(names))

    @model_validator(mode="after")
    def _answers_are_learnt(self) -> SftConfig:
        if self.metrics and self.trained not in ("assistant", "last") and "assistant" not in self.trained:
            raise ValueError(f"metrics compare answers, which trained: {self.trained} does not tell from the rest")
        return self


def encode(example: Example, encoder: Encoder, config: SftConfig) -> tuple[Row, ...]:
    """One row. Raises DataError with the reason."""
    if example.kind == "text":
        return (Row(*encoder.text(example.completion)),)
    if example.messages:
        ids, weights = encoder.dialogue(example.messages, config.trained, example.tools)
        extra = _last_answer(example, encoder, ids, weights) if config.metrics else {}
        return (Row(ids, weights, extra=extra),)
    ids, weights = encoder.completion(example.prompt_text, example.completion)
    extra = _told(example.completion, ids, weights.index(1.0)) if config.metrics else {}
    return (Row(ids, (1.0,) * len(ids) if config.trained == "all" else weights, extra=extra),)


def _last_answer(example: Example, encoder: Encoder, ids: Sequence[int], weights: Sequence[float]) -> Mapping[str, Any]:
    """What `Objective.generates` wants to know of a dialogue; nothing where no answer is learnt after a prompt."""
    messages = example.messages
    last = max((k for k, one in enumerate(messages) if one.role == "assistant" and one.weight != 0), default=0)
    if last == 0:
        return {}
    prompt = encoder.render_prompt(messages[:last], example.tools)
    # the tokens at its end may be others where the answer follows
    same = next((k for k, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids)))
    start = next((k for k in range(same, len(ids)) if weights[k]), len(ids))
    called = "tool_calls" in dict(messages[last].more)  # of which the template makes a text
    return _told(None if called else messages[last].content, ids, start)


def _told(answer: str | None, ids: Sequence[int], start: int) -> Mapping[str, Any]:
    return {"answer": answer, "asked": len(ids) - start} if 0 < start < len(ids) else {}


def reports(config: SftConfig) -> tuple[str, ...]:
    """The names of what is measured beside the loss."""
    generated = (*config.metrics, *metrics.LENGTHS) if config.metrics else ()
    return ("token_accuracy", *(("nll_loss",) if config.label_smoothing else ()), *generated)


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
    found = {"loss": (nll.detach(), count), "token_accuracy": ((stats.correct * weight).sum(), count)}
    if not smoothing:
        return Loss((Term(nll),), found)
    assert stats.mean_logprob is not None
    smooth = (1 - smoothing) * nll - smoothing * (stats.mean_logprob * weight).sum()
    return Loss((Term(smooth),), found | {"loss": (smooth.detach(), count), "nll_loss": found["loss"]})


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
    reports=reports,
    generates=lambda config: Generated(tuple(config.metrics), config.max_new_tokens) if config.metrics else None,
    reading=("trained", "metrics", "max_new_tokens"),
    one_sided=lambda config: (
        None
        if config.trained in ("assistant", "last")
        else "which learns answers alone there: set objective.trained: last"
    ),
)
