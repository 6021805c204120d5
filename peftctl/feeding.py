"""Where the micro-batches of a run come from: the data's rows, or the policy's own answers to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftctl import objectives
from peftctl.data.batches import Batches
from peftctl.distributed import World
from peftctl.plan import Plan
from peftctl.policy import Policy
from peftctl.rollouts import Rollouts


def batches_of(planned: Plan, policy: Policy, world: World, facts: Mapping[str, Any]) -> Batches | Rollouts:
    """The data source of a run. `facts`: what the checkpoint that it goes on from knows of it."""
    settings, data = planned.recipe.train, planned.recipe.data
    batches = Batches(
        planned.data.train,
        batch_size=settings.batch_size,
        gradient_accumulation=settings.gradient_accumulation,
        tokens=settings.tokens_per_batch,
        bucket=data.bucket,
        seed=settings.seed,
        share=data.share_starts,
        padded=policy.layout.name == "padded",
        trim=policy.layout.name == "shared",  # what can share starts is causal
        total=planned.examples,
        validation=planned.data.validation,
        ranks=world.size,
        stream=planned.data.stream,
    )
    objective = objectives.get(planned.recipe.objective.name)
    if objective.rollout is None:
        return batches
    rollouts = Rollouts(batches, objective, planned.recipe.objective, policy, planned.chat, world)
    rollouts.restore(facts)
    return rollouts
