"""A workload's job as peftctl plans it: the recipe, the base, and the batches of every step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from peftctl import objectives, recipe
from peftctl.base import Base
from peftctl.batch import Batch
from peftctl.data.batches import Batches
from peftctl.data.dataset import prepare
from peftctl.plan import base_and_chat
from peftctl.schema import Recipe


class Prepared(NamedTuple):
    recipe: Recipe
    base: Base
    steps: list[Sequence[Batch]]  # of each optimizer step its micro-batches


def prepared(path: Path, overrides: Sequence[str]) -> Prepared:
    """What `peftctl train PATH --set ...` would train on, step by step. The recipe has `train.max_steps`."""
    wanted = recipe.load(path, list(overrides))
    base, chat = base_and_chat(wanted)
    data = prepare(wanted, chat, objectives.get(wanted.objective.name))
    settings = wanted.train
    batches = Batches(
        data.train,
        batch_size=settings.batch_size,
        gradient_accumulation=settings.gradient_accumulation,
        tokens=settings.tokens_per_batch,
        bucket=wanted.data.bucket,
        seed=settings.seed,
        trim=True,
        share=wanted.data.share_starts,
    )
    steps, position = [], 0
    for _ in range(settings.max_steps or 0):
        found, position = batches.step(position)
        steps.append(found)
    return Prepared(wanted, base, steps)
