"""Answers that a policy gives by itself to held-out prompts, greedily, and what is measured of them.

An objective that asks for it gets them as predictions, so that they are gathered from all processes and judged together
as those of a head are; the loop knows nothing of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from peftctl import metrics
from peftctl.batch import Batch
from peftctl.data.chat import Chat
from peftctl.objectives.base import Answer, Answers, Loss, Objective
from peftctl.policy import Policy
from peftctl.row import Row
from peftctl.sampling import sample
from peftctl.seq2seq import two_sided

Heard = Callable[[Row, Answer, str], None]  # a row, the answer to its prompt, and the right one


def answering(
    objective: Objective[Any],
    config: Any,
    policy: Policy,
    chat: Chat,
    positions: int | None,
    heard: Heard = lambda row, answer, right: None,
) -> Objective[Any]:
    """The objective, which without gradients also measures the policy's own answers; itself where it asks for none.

    `positions`: how many the base has for a row. The answers are those of rows that have a prompt.
    """
    wanted = objective.generates(config)
    if wanted is None:
        return objective

    def loss(asked: Answers, reference: Answers | None, batch: Batch, config: Any, *shared: Any) -> Loss:
        found = objective.loss(asked, reference, batch, config, *shared)
        rows = [row for row in batch.rows if "asked" in row.extra]
        if torch.is_grad_enabled() or not rows:
            return found
        answers = greedy(policy, rows, chat, wanted.max_new_tokens, positions)
        right = [_right(row, chat) for row in rows]
        for row, answer, text in zip(rows, answers, right, strict=True):
            heard(row, answer, text)
        count = torch.tensor(len(rows))
        told = (sum(len(answer.ids) for answer in answers), sum(answer.ended for answer in answers))
        more = {name: (torch.tensor(value), count) for name, value in zip(metrics.LENGTHS, told, strict=True)}
        said = [answer.text for answer in answers]
        return found._replace(metrics=found.metrics | more, predictions=(said, right))

    return replace(objective, loss=loss, judge=partial(metrics.of_all, names=wanted.metrics))


def greedy(policy: Policy, rows: Sequence[Row], chat: Chat, most: int, positions: int | None) -> list[Answer]:
    """The answers to the prompts of some rows, each token the likeliest; no longer than the positions allow."""
    prompts = [_prompt(row) for row in rows]
    taken = [1 if two_sided(policy.model) else len(prompt) for prompt in prompts]  # of a decoder, by its first token
    virtual = policy.attachment.virtual()
    left = None if positions is None else positions - (virtual.length if virtual is not None else 0)
    limits = [most if left is None else max(1, min(most, left - own)) for own in taken]
    answers = sample(policy, prompts, 1, max_new_tokens=limits, end=chat.eos_ids)
    return [Answer(tuple(ids), chat.decode(ids), ids[-1] in chat.eos_ids) for ids in answers]


def _prompt(row: Row) -> tuple[int, ...]:
    return row.ids[: row.source or len(row.ids) - row.extra["asked"]]


def _right(row: Row, chat: Chat) -> str:
    """The right answer as the data has it; where that is no text, as its labels say it."""
    if row.extra["answer"] is not None:
        return str(row.extra["answer"])
    start = len(row.ids) - row.extra["asked"]
    return chat.decode([index for index, weight in zip(row.ids[start:], row.weights[start:], strict=True) if weight])
