"""A preference that is known, for even tokens over odd ones, is learnt by every objective and holds on unseen pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from peftctl import methods, optim
from peftctl.adapter import attach
from peftctl.batch import Batch, build
from peftctl.checkpoint import Progress
from peftctl.objectives import get
from peftctl.opened import policy_of
from peftctl.policy import Policy, Reference
from peftctl.row import Row
from peftctl.trainer import Job, Question, evaluate, train
from tests.models import VOCABULARY, tiny
from tests.objectives.paired import PAIRED

STEPS, SIZE = 40, 16
# where most of the loss is that of the answers themselves, the preference gets more weight
SETTINGS: dict[str, dict[str, Any]] = {"cpo": {"beta": 1.0}, "orpo": {"beta": 5.0}}


def answer(generator: torch.Generator, parity: int) -> tuple[int, ...]:
    """2 to 6 of 32 tokens, all even or all odd: no more than a frozen head of 32 dimensions can tell apart."""
    length = int(torch.randint(2, 7, (), generator=generator))
    return tuple((2 * torch.randint(2, 18, (length,), generator=generator) + parity).tolist())


def rows(seed: int, roles: tuple[str, str]) -> list[Row]:
    """A prompt with an answer of even tokens and one of odd tokens."""
    generator = torch.Generator().manual_seed(seed)
    prompt = (1, *torch.randint(3, VOCABULARY, (4,), generator=generator).tolist())
    found = []
    for parity, role in enumerate(roles):
        own = answer(generator, parity)
        found.append(Row(prompt + own, (0.0,) * len(prompt) + (1.0,) * len(own), seed, role))
    return found


@dataclass
class Fresh:
    """Pairs that are never seen twice; or single answers, even and odd in turn."""

    kto: bool
    events: list[dict[str, Any]] = field(default_factory=list)

    def step(self, position: int) -> tuple[list[Batch], int]:
        seeds = range(position, position + SIZE)
        if not self.kto:
            return [build([row for seed in seeds for row in rows(seed, ("chosen", "rejected"))])], position + SIZE
        judged = [(rows(seed, ("desirable", "undesirable"))[seed % 2],) for seed in seeds]
        pair = get("kto").pair
        assert pair is not None
        return [build([row for own in pair(judged, range(SIZE)) for row in own])], position + SIZE

    def evaluation(self) -> Iterator[Batch]:
        return iter(())


def made() -> Policy:
    model = tiny("llama")
    method = methods.get("lora")
    attachment = attach(model, method, method.config(name="lora", rank=4, target_modules="all-linear"), 0)
    return policy_of(model, attachment, 2).train()


@pytest.mark.parametrize("name", [*PAIRED, "kto"])
def test_even_answers_come_to_be_preferred(name: str) -> None:
    policy, objective = made(), get(name)
    question = Question(
        objective, objective.config(name=name, **SETTINGS.get(name, {})), policy, Reference(policy, None)
    )
    parameters = policy.attachment.trainable()
    source = Fresh(name == "kto")
    job = Job(
        question=question,
        batches=source,
        parameters=parameters,
        optimizer=optim.build(parameters, {}, "adamw", 0.01),
        lr=0.01,
        schedule=lambda step: 1.0,
        steps=STEPS,
        emit=source.events.append,
        save=lambda progress: None,
    )
    held_out = [build([row for seed in range(10**6, 10**6 + 100) for row in rows(seed, ("chosen", "rejected"))])]
    judge = Question(get("dpo"), get("dpo").config(name="dpo"), policy, Reference(policy, None))
    before = evaluate(judge, held_out, "cpu")
    train(job, Progress())
    after = evaluate(judge, held_out, "cpu")
    assert before is not None and after is not None
    assert before["rewards/accuracies"] == 0.0 and after["rewards/accuracies"] > 0.95
    assert source.events[-1]["loss"] < source.events[0]["loss"]
