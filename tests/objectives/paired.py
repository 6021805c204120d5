"""Pairs for tests: a policy that answers what it is told to, batches of pairs, and numbers for them."""

from __future__ import annotations

import torch

from peftctl.batch import Batch, build
from peftctl.objectives import get, names
from peftctl.objectives.base import TokenStats
from peftctl.row import Row

PAIRED = [name for name in names() if "preference" in get(name).kinds and get(name).task == "causal-lm"]
REFERENCED = [name for name in PAIRED if get(name).reference(get(name).config(name=name))]


class Says:
    """A policy that answers the given log-probabilities, one a label."""

    def __init__(self, logprob: torch.Tensor) -> None:
        self.logprob = logprob

    def tokens(self, batch: Batch) -> TokenStats:
        return TokenStats(self.logprob + 0, torch.ones_like(self.logprob))


def pairs(n: int, length: int = 3, growth: int = 1) -> Batch:
    """`n` pairs; the rejected answers are one token longer, and each pair's answers longer than the last pair's."""
    rows = []
    for i in range(n):
        for k, role in enumerate(("chosen", "rejected")):
            answer = tuple(range(10 * k + 5, 10 * k + 5 + length + k + growth * (i % 3)))
            rows.append(Row((1, 2 + i, *answer), (0.0, 0.0, *(1.0,) * len(answer)), i, role))
    return build(rows)


def some(batch: Batch, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -3 * torch.rand(len(batch.labels.target), generator=generator, dtype=dtype)


def value(name: str, policy: torch.Tensor, reference: torch.Tensor, batch: Batch, **settings: object) -> torch.Tensor:
    """The loss as the trainer adds it up."""
    objective = get(name)
    config = objective.config(name=name, **settings)
    against = Says(reference) if objective.reference(config) else None
    found = objective.loss(Says(policy), against, batch, config)
    weights = objective.weights(batch, config)
    return sum(t.coefficient * t.sum / w for t, w in zip(found.terms, weights, strict=True))  # type: ignore[return-value]
