"""Group relative policy optimization: of several answers to one prompt, those that score above the group's mean gain.

https://arxiv.org/abs/2402.03300; the losses without its biases of length and of difficulty, or by token, are those of
https://arxiv.org/abs/2503.20783 (Dr. GRPO) and https://arxiv.org/abs/2503.14476 (DAPO).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from peftctl.errors import DataError
from peftctl.functions import is_one
from peftctl.objectives import _pairs as pairs
from peftctl.objectives.base import Answer, Answers, Encoder, Generate, Loss, Objective, ObjectiveConfig, Term
from peftctl.rewards import Reward, Score, names, scores
from peftctl.row import Example, Row

if TYPE_CHECKING:
    from torch import Tensor

    from peftctl.batch import Batch

SMALLEST = 1e-4  # added to a group's standard deviation, so that equal rewards divide by something


class GrpoConfig(ObjectiveConfig):
    rewards: list[Reward] = Field(min_length=1, description="what an answer is worth: functions, each with a weight")
    group_size: int = Field(8, ge=2, description="answers to each prompt")
    max_new_tokens: int = Field(128, ge=1, description="most tokens of an answer")
    iterations: int = Field(1, ge=1, description="optimizer steps that learn from the same answers")
    clip: float = Field(0.2, gt=0, lt=1, description="how far a token's probability ratio counts below 1, and above it")
    clip_high: float | None = Field(None, gt=0, allow_inf_nan=False, description="above 1, where that is not clip")
    beta: float = Field(
        0.04, ge=0, allow_inf_nan=False, description="of the distance from the reference; 0: none asked"
    )
    loss: Literal["grpo", "dr-grpo", "dapo"] = Field(
        "grpo",
        description="grpo: a mean by token within each answer, then over answers; dapo: over all tokens of the step; "
        "dr-grpo: sums over max_new_tokens, and advantages not divided by the group's deviation",
    )
    reference: str = Field("initial", min_length=1, description="as of dpo")


def encode(example: Example, encoder: Encoder, config: GrpoConfig) -> tuple[Row, ...]:
    """One row, the prompt alone, with the right answer where one is known. Raises DataError with the reason."""
    messages, answer = example.messages, example.completion
    if messages and example.kind != "prompt":
        last = max(index for index, message in enumerate(messages) if message.role == "assistant")
        messages, answer = messages[:last], messages[last].content
        if not messages:
            raise DataError("nothing stands before the assistant's answer that could be asked")
    if not answer and any(reward.compares for reward in config.rewards):
        raise DataError("no 'answer', which the reward exact compares with")
    asked = messages[-1].content if messages else example.prompt_text
    ids = encoder.render_prompt(messages, example.tools) if messages else encoder.prompt(example.prompt_text)
    return (Row(ids, (0.0,) * len(ids), extra={"prompt": asked, "answer": answer or None}),)


def rollout(generate: Generate, rows: Sequence[Row], config: GrpoConfig) -> list[Row]:
    """A group of answers to each prompt, one after another; each row has its advantage and what is measured of it."""
    judges = scores(tuple(config.rewards))
    groups = zip(rows, generate(rows, config.group_size, config.max_new_tokens), strict=True)
    return [row for prompt, answers in groups for row in _group(prompt, answers, judges, config)]


def _group(
    prompt: Row, answers: Sequence[Answer], judges: dict[str, tuple[float, Score]], config: GrpoConfig
) -> list[Row]:
    asked, right = prompt.extra["prompt"], prompt.extra["answer"]
    by_name = {name: [score(asked, answer.text, right) for answer in answers] for name, (_, score) in judges.items()}
    totals = [sum(weight * by_name[name][k] for name, (weight, _) in judges.items()) for k in range(len(answers))]
    mean, deviation = fmean(totals), stdev(totals)
    scale = 1.0 if config.loss == "dr-grpo" else deviation + SMALLEST
    rows = []
    for k, (answer, total) in enumerate(zip(answers, totals, strict=True)):
        measured = {"reward": total, "reward_std": deviation, "zero_variance": float(deviation == 0)}
        measured |= {f"rewards/{name}": by_name[name][k] for name in judges}
        measured |= {"completions/length": len(answer.ids), "completions/ended": float(answer.ended)}
        weights = (0.0,) * len(prompt.ids) + (1.0,) * len(answer.ids)
        extra = {"advantage": (total - mean) / scale, "measured": measured}
        rows.append(Row(prompt.ids + answer.ids, weights, prompt.example, extra=extra))
    return rows


def weights(batch: Batch, config: GrpoConfig) -> tuple[float, ...]:
    """The number of answers, of tokens that they might have had, or of those that they have."""
    if config.loss == "dapo":
        return (float(batch.labels.weight.sum()),)
    return (float(len(batch.rows) * (config.max_new_tokens if config.loss == "dr-grpo" else 1)),)


def loss(policy: Answers, reference: Answers | None, batch: Batch, config: GrpoConfig) -> Loss:
    """Minus the clipped gains (equation 3), and beta times the distance from the reference (equation 4)."""
    import torch

    logprob = policy.tokens(batch).logprob
    ratio = (logprob - _before(batch, logprob)).exp()
    advantage = logprob.new_tensor([row.extra["advantage"] for row in batch.rows])[batch.labels.row]
    low, high = 1 - config.clip, 1 + (config.clip if config.clip_high is None else config.clip_high)
    losses = -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    weight = batch.labels.weight
    count, tokens = weight.new_tensor(len(batch.rows)), weight.sum()
    clipped = ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))
    metrics = {"clip_fraction": ((clipped * weight).sum(), tokens)}
    for name in batch.rows[0].extra["measured"]:
        metrics[name] = (weight.new_tensor([row.extra["measured"][name] for row in batch.rows]).sum(), count)
    if reference is not None:
        with torch.no_grad():
            gap = reference.tokens(batch).logprob
        gap = gap - logprob
        kl = gap.exp() - gap - 1
        losses = losses + config.beta * kl
        metrics["kl"] = ((kl.detach() * weight).sum(), tokens)
    by_answer = pairs.per_row(losses, batch, mean=config.loss == "grpo")
    return Loss((Term(pairs.total(by_answer)),), metrics)


def _before(batch: Batch, logprob: Tensor) -> Tensor:
    """The labels' log-probabilities when the answers were given: now, where each answer is learnt from once."""
    if "old" not in batch.rows[0].extra:
        return logprob.detach()
    return logprob.new_tensor([value for row in batch.rows for value in row.extra["old"]])


def reports(config: GrpoConfig) -> tuple[str, ...]:
    """The names of what `loss` measures."""
    rewards = (f"rewards/{name}" for name in names(tuple(config.rewards)))
    found = ("reward", "reward_std", "zero_variance", *rewards, "completions/length", "completions/ended")
    return (*found, "clip_fraction", *(("kl",) if config.beta else ()))


OBJECTIVE = Objective(
    name="grpo",
    summary="make the answers likelier that a program scores above others to the same prompt",
    paper="https://arxiv.org/abs/2402.03300",
    config=GrpoConfig,
    kinds=frozenset({"prompt", "messages", "completion"}),
    encode=encode,
    weights=weights,
    loss=loss,
    reference=lambda config: config.reference if config.beta else None,
    base_dropout=False,
    reports=reports,
    rollout=rollout,
    room=lambda config: config.max_new_tokens,
    repeats=lambda config: config.iterations,
    code=lambda config: tuple(dict.fromkeys(reward.name for reward in config.rewards if is_one(reward.name))),
)
