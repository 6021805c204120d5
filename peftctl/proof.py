"""After training, proof: the adapter moved from its start, and its file gives the answers that were in memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from peftctl.adapter import attach
from peftctl.batch import Batch, build
from peftctl.errors import TrainingError
from peftctl.policy import Policy
from peftctl.surgery import device_of

if TYPE_CHECKING:
    from peftctl.plan import Plan

EXAMPLES = 2


class Proof(NamedTuple):
    moved: int  # tensors that differ from their start
    max_difference: float  # between log-probabilities (or scores) in memory and from the file
    seconds: float


def prove(policy: Policy, start: dict[str, Tensor], planned: Plan, written: Path) -> Proof:
    """Raises TrainingError when nothing moved, or when the written file answers differently."""
    begun = time.perf_counter()
    trained = policy.attachment.trainable()
    moved = sum(not torch.equal(tensor, start[name]) for name, tensor in trained.items())
    if not moved:
        raise TrainingError(
            "training changed no parameter: the learning rate may be too small, or no label depends on the adapter"
        )
    difference = _difference(policy, planned, written)
    if not difference <= 1e-3:  # which NaN is not either
        raise TrainingError(f"{written} does not give the trained answers: they differ by {difference:.1e}")
    return Proof(moved, difference, time.perf_counter() - begun)


@torch.no_grad()
def _difference(policy: Policy, planned: Plan, written: Path) -> float:
    """Largest difference in log-probability on a few rows between the deltas in memory and those in the file."""
    from peftctl.formats import peft

    rows = planned.data.train.rows(range(min(EXAMPLES, len(planned.data.train))))
    # prompts have no labels; what the deltas do to them is as good a proof
    rows = [row if any(row.weights) else row._replace(weights=(1.0,) * len(row.ids)) for row in rows]
    batch = build(rows).to(device_of(policy.model))
    policy.eval()
    # both sides by the plain hooks, so that a difference is the file's
    policy.attachment.remove()
    policy.attachment.install(policy.model)
    expected = _answers(policy, batch)
    adapter = peft.read(written, planned.skeleton)
    policy.attachment.remove()
    # the base was never changed, so a fresh attachment on it is a fresh base with the file's adapter
    fresh = attach(policy.model, adapter.method, adapter.config, planned.recipe.train.seed)
    fresh.load(adapter.tensors, str(written))
    again = Policy(policy.model, fresh, policy.layout, policy.head, policy.task_head).eval()
    return float((_answers(again, batch) - expected).abs().max())


def _answers(policy: Policy, batch: Batch) -> Tensor:
    return policy.tokens(batch).logprob if policy.task_head is None else policy.token_scores(batch)
