"""From a plan to what is in memory when the loop starts: base, deltas, reference and optimizer."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import torch

from peftctl import checkpoint, compute, methods, objectives, optim
from peftctl import model as models
from peftctl.adapter import attach, with_head
from peftctl.checkpoint import Progress, State
from peftctl.compute import Precision
from peftctl.imports import unswept
from peftctl.methods.attachment import Attachment
from peftctl.opened import policy_of
from peftctl.plan import Options, Plan
from peftctl.policy import Policy, Reference, checkpointed, frozen_copy
from peftctl.reference import reference_of
from peftctl.routing import balance_of
from peftctl.run_folder import RunFolder
from peftctl.schema import TrainConfig
from peftctl.skeleton import Skeleton, dotted
from peftctl.surgery import without_dropout
from peftctl.watch import Watch, watch_of


class Training(NamedTuple):
    """What is in memory when the loop starts."""

    policy: Policy
    attachment: Attachment
    start: dict[str, torch.Tensor]  # what was trained from; the proof compares with it
    reference: Reference | None
    optimizer: torch.optim.Optimizer
    progress: Progress
    watch: Watch | None  # of the evaluations, where the recipe asks for it


@unswept()
def load(
    planned: Plan,
    folder: RunFolder,
    state: State | None,
    options: Options,
    notice: Callable[[str], None] = lambda text: None,
) -> Training:
    """Base, deltas, reference and optimizer, as they are at the state's step (or at 0)."""
    recipe, settings = planned.recipe, planned.recipe.train
    objective = objectives.get(recipe.objective.name)
    # an automatic choice is made once: whoever resumes gets the same kernels
    chosen = folder.choice("device") if settings.device == "auto" else None
    device = models.device(chosen or settings.device)
    trust = options.trust_remote_code
    precision = Precision(recipe.model.dtype, _compute_type(settings, folder, device, notice))
    model = models.load(planned.base, precision, device, settings.seed, trust_remote_code=trust, notice=notice)
    if not objective.base_dropout:
        without_dropout(model)
    if settings.gradient_checkpointing:
        checkpointed(model)
    attachment = attach(model, methods.get(recipe.method.name), recipe.method, settings.seed)
    if planned.start is not None:
        values = with_head(planned.start.tensors, attachment, planned.skeleton)
        attachment.load(values, str(recipe.method.init_from))
    start = frozen_copy(attachment)
    policy = policy_of(model, attachment, planned.skeleton.dimensions.layers, recipe.model.layout, folder.layout())
    if settings.fuse:
        policy.fuse(pack=settings.pack_weights)
    if not objective.likelihood:  # what is learnt is a small difference of log-probabilities
        policy.exact_logits()
    policy.balance = balance_of(model, settings.router_loss)
    reference = reference_of(planned, policy, start, state, trust_remote_code=trust)
    optimizer = optim.build(
        attachment.trainable(),
        attachment.groups() | _head_rate(settings, planned.skeleton),
        settings.optimizer,
        settings.learning_rate,
        settings.betas,
        settings.weight_decay,
    )
    torch.manual_seed(settings.seed)
    random.seed(settings.seed)  # what some models drop whole layers by
    progress = Progress() if state is None else _restore(attachment, optimizer, state)
    policy.train()
    watch = watch_of(settings, attachment.tensors)
    if watch is not None and state is not None:
        watch.restore(state.facts, state.best)
    return Training(policy, attachment, start, reference, optimizer, progress, watch)


def _compute_type(settings: TrainConfig, folder: RunFolder, device: str, notice: Callable[[str], None]) -> str:
    """The type to compute in: the recipe's; where that is auto, the one that the run began with.

    A run that was begun before the type was recorded computed in the type that it stored.
    """
    before: str | None = folder.choice("compute_dtype") or folder.choice("dtype")
    if before is None:
        return settings.compute_dtype
    if settings.compute_dtype != "auto":
        if settings.compute_dtype != before:
            notice(f"computing in {settings.compute_dtype} from here on; the run computed in {before} so far")
        return settings.compute_dtype
    if before == "bfloat16" and device == "cpu" and not compute.fast_bfloat16():
        notice(
            "the run began on a machine with fast bfloat16, which this one lacks: it continues in bfloat16, for equal "
            "results, and much slower; --set train.compute_dtype=float32 continues in float32"
        )
    return before


def _head_rate(settings: TrainConfig, skeleton: Skeleton) -> dict[str, float]:
    """The learning-rate multiplier of each parameter of a task's head that has a rate of its own."""
    own = settings.head_learning_rate
    names = (dotted(module.path, name) for module in skeleton.added for name in module.shapes)
    return {} if own is None else dict.fromkeys(names, own / settings.learning_rate)


def _restore(attachment: Attachment, optimizer: torch.optim.Optimizer, state: State) -> Progress:
    attachment.load(state.adapter, "checkpoint")
    optim.restore(optimizer, attachment.trainable(), state.optimizer, state.optimizer_facts, "checkpoint")
    checkpoint.restore_random(state.rng)
    return state.progress
