"""What is said of each row of a file, kept while it is measured, and written as one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from peftctl.batch import Batch
from peftctl.data.encoded import Dataset
from peftctl.objectives.base import TokenStats
from peftctl.policy import Policy
from peftctl.storage import write_file
from peftctl.task import Task

Said = tuple[int, int, dict[str, Any]]  # example, place in it, and what is written


class Kept:
    """A policy that keeps what it scored."""

    def __init__(self, policy: Policy, task: Task, said: list[Said]) -> None:
        self.policy = policy
        self.labels = task.labels
        self.said = said

    def tokens(self, batch: Batch) -> TokenStats:
        return self.policy.tokens(batch)

    def row_scores(self, batch: Batch) -> Tensor:
        scores = self.policy.row_scores(batch)
        for number, (row, own) in enumerate(zip(batch.rows, scores.tolist(), strict=True)):
            role = {"role": row.role} if row.role else {}
            named = dict(zip(self.labels, own, strict=True))
            likeliest = {"label": max(named, key=named.__getitem__)} if len(named) > 1 else {}
            self.said.append((row.example, number, {**role, **likeliest, "scores": named}))
        return scores

    def token_scores(self, batch: Batch) -> Tensor:
        scores = self.policy.token_scores(batch)
        owners, best = batch.labels.row.tolist(), scores.argmax(-1).tolist()
        for number, row in enumerate(batch.rows):
            own = [self.labels[label] for owner, label in zip(owners, best, strict=True) if owner == number]
            self.said.append((row.example, number, {"tags": own}))
        return scores


def write(path: Path, dataset: Dataset, said: Iterable[Said]) -> None:
    """What was said of rows, in the order of the file, each with its place. Raises SaveError."""
    lines = [
        json.dumps({"place": dataset.places[example], **more}, ensure_ascii=False)
        for example, _, more in sorted(said, key=lambda one: one[:2])
    ]
    write_file(path, ("\n".join(lines) + "\n").encode())
