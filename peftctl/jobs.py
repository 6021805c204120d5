"""What the loop works with: its job, what is computed once and kept beside it, and what a checkpoint holds of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from peftctl import checkpoint, objectives, optim, remembered, reuse
from peftctl.answered import answering
from peftctl.checkpoint import Progress, State
from peftctl.data.batches import Batches
from peftctl.distributed import World
from peftctl.loading import Training
from peftctl.penalty import balanced, penalised
from peftctl.plan import Plan
from peftctl.remembered import Remembered
from peftctl.report import Event, Log, Sink
from peftctl.reuse import Reuse
from peftctl.rollouts import Rollouts
from peftctl.run_folder import RunFolder
from peftctl.trainer import Job, Question

ROUNDING = 1e-6  # of a loss: what a reference that is remembered, from other batches, may be away by


def kept(
    planned: Plan, training: Training, batches: Batches | Rollouts, folder: RunFolder, notice: Callable[[str], None]
) -> list[Reuse | Remembered]:
    """What is computed once and kept: the reference's log-probabilities, what the frozen blocks answer."""
    if isinstance(batches, Rollouts):
        return []  # no row comes twice
    settings, found = planned.recipe.train, list[Reuse | Remembered | None]()
    steps, base, fused = planned.steps, planned.base, settings.fuse
    if planned.data.stream is not None:
        return []  # nobody knows all rows
    if settings.cache_reference and training.reference is not None:
        chosen = folder.choice("remembered_reference")
        reference = training.reference
        found.append(remembered.plan(reference, batches, steps, base, fused=fused, chosen=chosen, notice=notice))
    if settings.cache_frozen:
        blocks = folder.choice("frozen_blocks")
        found.append(reuse.plan(training.policy, batches, steps, base, fused=fused, chosen=blocks, notice=notice))
    return [one for one in found if one is not None]


def begun(planned: Plan, training: Training, emit: Sink, notice: Callable[[str], None]) -> Sink:
    """The sink, told of the first step as `start_distance` how far its loss is from that of a policy which is its
    reference: of DPO, from ln 2.
    """
    recipe = planned.recipe
    equal = objectives.get(recipe.objective.name).start(recipe.objective)
    if equal is None or training.reference is None:
        return emit
    expected = float(torch.tensor(equal))  # a loss is taken of numbers in fp32

    def telling(event: Event) -> None:
        if event["event"] == "step" and event["step"] == 1:
            distance = event["loss"] - expected
            event = {**event, "start_distance": distance}
            if abs(distance) > ROUNDING:
                notice(f"the first loss is {distance:+.3g} from {equal:.6f}, that of equal answers")
        emit(event)

    return telling


def job(
    planned: Plan,
    training: Training,
    batches: Batches | Rollouts,
    stop: Callable[[], int | None],
    world: World,
    emit: Sink,
    save: Callable[[Progress], None],
) -> Job:
    recipe, settings = planned.recipe, planned.recipe.train
    objective = objectives.get(recipe.objective.name)
    positions = planned.base.positions
    objective = answering(objective, recipe.objective, training.policy, planned.chat, positions)
    objective = balanced(penalised(objective, training.attachment), training.policy)
    return Job(
        question=Question(objective, recipe.objective, training.policy, training.reference),
        batches=batches,
        parameters=training.attachment.trainable(),
        optimizer=training.optimizer,
        lr=settings.learning_rate,
        schedule=lambda step: optim.schedule(settings.schedule, step, planned.steps, planned.warmup_steps),
        steps=planned.steps,
        emit=emit,
        save=save,
        stop=stop,
        after_backward=training.attachment.after_backward,
        max_grad_norm=settings.max_grad_norm,
        most_skipped=settings.max_skipped if settings.on_nan == "skip_step" else 0,
        max_seconds=None if settings.max_time is None else 60 * settings.max_time,
        eval_every=settings.eval_every,
        save_every=settings.save_every,
        world=world,
        begin=partial(world.seed, settings.seed),
        watch=training.watch,
    )


def save(
    folder: RunFolder, training: Training, batches: Batches | Rollouts, log: Log, keep: int, progress: Progress
) -> None:
    tensors, facts = optim.state(training.optimizer, training.attachment.trainable())
    reference = training.reference.initial if training.reference is not None else None
    watched, best = ({}, None) if training.watch is None else training.watch.state()
    state = State(
        progress=progress,
        adapter=training.attachment.tensors(),
        optimizer=tensors,
        optimizer_facts=facts,
        rng=checkpoint.random_state(),
        reference=reference,
        facts=(batches.state() if isinstance(batches, Rollouts) else {}) | watched,
        best=best,
    )
    log.sync()  # a checkpoint whose steps the log lacks could not be gone on from
    checkpoint.save(folder.path, state)
    checkpoint.rotate(folder.path, keep)
