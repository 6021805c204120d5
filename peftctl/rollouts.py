"""The batches of a run that learns from its own answers: a step's prompts are answered by the policy as it is then.

What is drawn is a function of the seed, the step and the policy, and of no other state: a run that goes on from a
checkpoint gives the answers that it would have given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from peftctl import guards
from peftctl.batch import Batch
from peftctl.data.batches import Batches
from peftctl.data.chat import Chat
from peftctl.data.encoded import Dataset
from peftctl.distributed import ALONE, World
from peftctl.frozen import evaluating
from peftctl.objectives.base import Answer, Objective
from peftctl.policy import Policy
from peftctl.row import Row
from peftctl.sampling import sample


class Rollouts:
    """Micro-batches of answers, in the place of those of `prompts`.

    The position still counts examples: a step takes as many as one of `prompts` does, and steps that learn from the
    same answers take the same. Where prompts are streamed, a position of theirs is that of as many steps.
    """

    def __init__(
        self,
        prompts: Batches,
        objective: Objective[Any],
        config: Any,
        policy: Policy,
        chat: Chat,
        world: World = ALONE,
    ) -> None:
        self.prompts = prompts
        self.objective = objective
        self.config = config
        self.policy = policy
        self.chat = chat
        self.world = world
        self.repeats = objective.repeats(config)
        self.index = -1  # which rollout `parts` are the answers of
        self.parts: list[list[Row]] = []

    def step(self, position: int) -> tuple[list[Batch], int]:
        """The micro-batches of the step at `position`, and the position after it."""
        index, start, after = self._place(position)
        if index != self.index:
            self.parts = self._answered(index, start)
            self.index = index
        return [self.prompts.built(part) for part in self.parts], after

    def _place(self, position: int) -> tuple[int, int, int]:
        """Which rollout the step at a position learns from, where its prompts begin, and the position after it."""
        prompts = self.prompts
        if prompts.stream is None:
            index = position // prompts.per_step // self.repeats
            return index, index * prompts.per_step, position + prompts.per_step
        start, turn = divmod(position, self.repeats)
        return start, start, position + 1 if turn + 1 < self.repeats else prompts.chosen(start)[2] * self.repeats

    def evaluation(self) -> Iterator[Batch]:
        """Answers to the held-out prompts, drawn by the same numbers each time; nothing when there are none."""
        held = self.prompts.validation
        for start in range(0, len(held) if held is not None else 0, self.prompts.batch_size):
            assert held is not None
            chosen = range(start, min(start + self.prompts.batch_size, len(held)))
            yield self.prompts.built(self._rows(held, chosen, f"held-out {start}"))

    def state(self) -> dict[str, Any]:
        """What a checkpoint must know, as JSON: answers that further steps learn from."""
        if self.repeats == 1:
            return {}
        return {"rollout": self.index, "parts": [[_plain(row) for row in part] for part in self.parts]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with the answers of a checkpoint."""
        if "rollout" in state:
            self.index = state["rollout"]
            self.parts = [[_row(values) for values in part] for part in state["parts"]]

    def _answered(self, index: int, start: int) -> list[list[Row]]:
        """The answers of one rollout, by micro-batch."""
        with guards.memory(f"the answers of rollout {index + 1}"):
            data, chosen, _ = self.prompts.chosen(start)
            rows = self._rows(data, chosen, f"rollout {index}", self.world)
            groups = [list(group) for _, group in groupby(rows, key=lambda row: row.example)]
            parts = self.prompts.parts([_size(group, self.prompts.padded) for group in groups])
            found = [[row for place in part for row in groups[place]] for part in parts]
            return found if self.repeats == 1 else [self._remembered(part) for part in found]

    def _rows(self, data: Dataset, chosen: Sequence[int], name: str, world: World = ALONE) -> list[Row]:
        """The rows of the answers to some prompts, which the processes of `world` share out among them."""

        def generate(prompts: Sequence[Row], count: int, most: int) -> list[list[Answer]]:
            numbers = _numbers(f"peftctl {name}, seed {self.prompts.seed}", len(prompts) * count, most)
            own = [index for index in range(len(prompts)) if world.owns(index)]
            places = [index * count + k for index in own for k in range(count)]
            drawn = sample(
                self.policy,
                [prompts[index].ids for index in own],
                count,
                max_new_tokens=most,
                end=self.chat.eos_ids,
                numbers=numbers[places],
            )
            known = [pair for told in world.gather(list(zip(places, drawn, strict=True))) for pair in told]
            answers = [self._answer(ids) for _, ids in sorted(known)]
            return [answers[start : start + count] for start in range(0, len(answers), count)]

        assert self.objective.rollout is not None
        with evaluating(self.policy):
            return self.objective.rollout(generate, data.rows(chosen), self.config)

    def _answer(self, ids: list[int]) -> Answer:
        return Answer(tuple(ids), self.chat.decode(ids), ids[-1] in self.chat.eos_ids)

    def _remembered(self, part: list[Row]) -> list[Row]:
        """The rows of a micro-batch with the log-probabilities that their labels have now."""
        batch = self.prompts.built(part)
        with evaluating(self.policy), torch.no_grad():
            device = next(self.policy.model.parameters()).device
            logprob = self.policy.tokens(batch.to(device)).logprob
        counts = torch.bincount(batch.labels.row, minlength=len(part)).tolist()
        old = [values.tolist() for values in torch.split(logprob.cpu(), counts)]
        return [row._replace(extra={**row.extra, "old": own}) for row, own in zip(part, old, strict=True)]


def _numbers(name: str, rows: int, columns: int) -> Tensor:
    """Numbers in [0, 1), (rows, columns), that the name decides."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _size(rows: Sequence[Row], padded: bool) -> int:
    lengths = [len(row.ids) for row in rows]
    return len(rows) * max(lengths) if padded else sum(lengths)


def _plain(row: Row) -> list[Any]:
    return [list(row.ids), list(row.weights), row.example, row.role, dict(row.extra)]


def _row(values: Sequence[Any]) -> Row:
    ids, weights, example, role, extra = values
    return Row(tuple(ids), tuple(weights), example, role, extra=extra)
