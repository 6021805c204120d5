"""The best evaluation of a run: whether it is worth going on, and what the adapter was then."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor

from peftctl.errors import TrainingError, suggest
from peftctl.methods.attachment import Attachment
from peftctl.schema import TrainConfig

STATE = ("value", "step", "seen", "since")
LOW = ("loss", "error", "perplexity", "kl")  # ends of the names of what is better when it is lower


class Watch:
    """Told of every evaluation. Its state goes into the checkpoints, so that a resumed run decides as one that was
    never stopped.

    `patience`: evaluations in a row without a better one that are enough; None for no end. `tensors`: what answers the
    adapter's values, to be kept of the best evaluation; None where they need not be.
    """

    def __init__(
        self,
        metric: str = "loss",
        better: Literal["auto", "lowest", "highest"] = "auto",
        patience: int | None = None,
        tensors: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.metric = metric.removeprefix("validation_")
        self.sign = 1 if better == "highest" or (better == "auto" and not self.metric.endswith(LOW)) else -1
        self.patience = patience
        self.tensors = tensors
        self.value: float | None = None
        self.step = 0  # of the best evaluation
        self.seen = 0  # the step of the last one
        self.since = 0  # how many there were after the best
        self.kept: Mapping[str, Tensor] | None = None

    def __call__(self, step: int, found: Mapping[str, float]) -> None:
        """Raises TrainingError where there is no such metric."""
        if step <= self.seen:
            return  # a resumed run evaluates its checkpoint's step again
        if self.metric not in found:
            known = ", ".join(found)
            near = suggest(self.metric, found)
            raise TrainingError(f"train.best_by: no {self.metric} is measured{near}; there is: {known}")
        self.seen, value = step, found[self.metric]
        if math.isnan(value) or (self.value is not None and self.sign * value <= self.sign * self.value):
            self.since += 1
            return
        self.value, self.step, self.since = value, step, 0
        if self.tensors is not None:
            self.kept = {name: tensor.detach().clone() for name, tensor in self.tensors().items()}

    def enough(self) -> bool:
        return self.patience is not None and self.since >= self.patience

    def state(self) -> tuple[dict[str, Any], Mapping[str, Tensor] | None]:
        """For a checkpoint: what JSON holds, and the best adapter where it is kept."""
        return {"watch": {name: getattr(self, name) for name in ("metric", *STATE)}}, self.kept

    def restore(self, facts: Mapping[str, Any], kept: Mapping[str, Tensor] | None) -> None:
        """Go on from a checkpoint's state; from the beginning where that watched something else."""
        found = facts.get("watch", {})
        if found.get("metric") != self.metric or (self.tensors is not None and kept is None):
            return
        for name in STATE:
            setattr(self, name, found[name])
        self.kept = kept if self.tensors is not None else None


def watch_of(settings: TrainConfig, tensors: Callable[[], Mapping[str, Tensor]]) -> Watch | None:
    """What a recipe asks for; None where it asks for nothing of the kind."""
    if settings.early_stopping is None and not settings.keep_best:
        return None
    kept = tensors if settings.keep_best else None
    return Watch(settings.best_by, settings.best_is, settings.early_stopping, kept)


def back_to_best(
    watch: Watch | None, attachment: Attachment, early: bool, notice: Callable[[str], None]
) -> dict[str, Any]:
    """The adapter as it was at the best evaluation, where that is kept; what the run's result says of it.

    `early`: whether the run ended before its last step.
    """
    if watch is None or watch.value is None:
        return {}
    found = f"{watch.metric} {watch.value:.4g} at step {watch.step} is the best"
    if early and watch.enough():
        notice(f"stopped at step {watch.seen}: {found}, and {watch.since} evaluations in a row brought no better one")
    if watch.kept is not None:
        attachment.load(watch.kept, "the best evaluation")
        notice(f"the adapter is that of step {watch.step}: {found}")
    return {"best": {"step": watch.step, watch.metric: watch.value}}
