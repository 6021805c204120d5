"""The loop: batches, loss, backward, clip, step, event, perhaps a checkpoint. It knows no method, objective or file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftctl import guards, optim
from peftctl.batch import Batch, Tell, counted
from peftctl.checkpoint import Progress
from peftctl.distributed import ALONE, World
from peftctl.errors import DataError, Stopped, TrainingError
from peftctl.gathered import Predictions, average, gathered, sums, total
from peftctl.objectives.base import Answers, Loss, Objective
from peftctl.report import Doing
from peftctl.watch import Watch

Event = dict[str, Any]


class Batches(Protocol):
    """Where micro-batches come from; a position is an integer, so that any step can be asked for again."""

    def step(self, position: int) -> tuple[Sequence[Batch], int]:
        """The micro-batches of the optimizer step that starts at a position, and the position after it."""

    def evaluation(self) -> Iterable[Batch]:
        """The validation set; nothing when there is none."""


@dataclass(frozen=True)
class Question:
    """What is minimised: an objective put to a policy."""

    objective: Objective[Any]
    config: Any
    policy: Answers  # its modules' train and eval modes are as the caller set them
    reference: Answers | None = None
    shared: tuple[Mapping[str, Tensor], ...] = ()  # what the loss must know of other batches, for some objectives

    def weights(self, batch: Batch) -> tuple[float, ...]:
        return self.objective.weights(batch, self.config)

    def loss(self, batch: Batch) -> Loss:
        return self.objective.loss(self.policy, self.reference, batch, self.config, *self.shared)

    def judged(self, predictions: Sequence[Predictions]) -> dict[str, float]:
        """What is measured on all predictions of several micro-batches together."""
        said, true = (list(chain.from_iterable(parts)) for parts in zip(*predictions, strict=True))
        if self.objective.judge is None or not said:
            return {}
        return dict(self.objective.judge(said, true))

    def about(self, batches: Iterable[Batch], device: torch.device | str) -> Question:
        """The question put to these batches as a whole: what an example's loss must know of the others is found."""
        if self.objective.shared is None:
            return self
        with _evaluating(self.policy), torch.no_grad():
            moved = (batch.to(device) for batch in batches)
            return replace(self, shared=(self.objective.shared(self.policy, self.reference, moved, self.config),))


@dataclass(frozen=True)
class Job:
    """All that the loop works with. Everything outside it (files, screens, signals) is behind the callables."""

    question: Question
    batches: Batches
    parameters: Mapping[str, nn.Parameter]
    optimizer: Optimizer
    lr: float
    schedule: Callable[[int], float]  # step, from 1 -> multiplier of lr
    steps: int
    emit: Callable[[Event], None]
    save: Callable[[Progress], None]
    stop: Callable[[], int | None] = lambda: None  # the signal that asked to stop
    after_backward: Callable[[int, int], None] = lambda step, total: None
    max_grad_norm: float | None = 1.0
    most_skipped: int = 0  # steps in a row that may be passed over because their loss or gradient is not finite
    max_seconds: float | None = None
    eval_every: int | None = None
    save_every: int | None = None
    world: World = ALONE
    begin: Callable[[int], None] = lambda step: None  # before each step
    watch: Watch | None = None  # of the evaluations, which may end the run
    progress: Callable[[Doing], None] = lambda doing: (
        None
    )  # before a step or an evaluation, and after its micro-batches

    def finished(self, progress: Progress) -> bool:
        late = self.max_seconds is not None and progress.seconds >= self.max_seconds
        return progress.step >= self.steps or self.enough() or late

    def enough(self) -> bool:
        return self.watch is not None and self.watch.enough()


def train(job: Job, progress: Progress) -> Progress:
    """Train to the end, from where `progress` is. Raises TrainingError, DataError, or Stopped on a signal."""
    origin = time.perf_counter() - progress.seconds
    if progress.step:
        _between(job, progress, saved=True)  # a checkpoint comes before its step's evaluation
    elif (number := job.world.first(job.stop())) is not None:
        raise Stopped("stopped before the first step; --resume starts it", number)
    still = guards.Standstill(job.parameters)
    while not job.finished(progress):
        begun = time.perf_counter()
        step = progress.step + 1
        job.progress(Doing("step", step))
        batches, position = job.batches.step(progress.position)
        lr = optim.scale(job.optimizer, job.lr, job.schedule(step))
        job.begin(step)

        with guards.memory(f"step {step}"):
            job.optimizer.zero_grad(set_to_none=True)
            tell = _telling(job, "step", step, len(batches))
            loss, metrics = _backward(job.question, batches, step, _device(job.parameters), job.world, tell)
            job.world.add_gradients(job.parameters)
            whole = nn.utils.get_total_norm([p.grad for p in job.parameters.values() if p.grad is not None])
            norm = float(whole)
            skipped = _skipped(job, progress, loss, norm, lr, batches)
            if not skipped:
                job.after_backward(step, job.steps)
                if job.max_grad_norm is not None:
                    nn.utils.clip_grads_with_norm_(job.parameters.values(), job.max_grad_norm, whole)
                job.optimizer.step()

        now = time.perf_counter()
        tokens = sum(batch.real_tokens for batch in batches)
        passed: float = job.world.gather(now - origin)[0]  # one clock for all, as it may end the run
        progress = Progress(step, position, progress.tokens + tokens, passed, skipped)
        event = {"event": "step", "step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": tokens}
        event |= {"tokens_per_s": tokens / (now - begun), "seconds": now - begun}
        if skipped:
            event |= {"skipped": skipped, "examples": _examples(batches)}
        job.emit(event | metrics | event)  # a metric of one of these names does not replace it
        if not skipped:
            still.check(step, loss, lr, norm)
        _between(job, progress)
    return progress


def _between(job: Job, progress: Progress, saved: bool = False) -> None:
    """What is due after a step: a checkpoint, then an evaluation, then leaving if that was asked for."""
    last = job.finished(progress)
    if not saved and (last or _due(progress.step, job.save_every)):
        job.save(progress)
        saved = True
    if last or _due(progress.step, job.eval_every):
        _validate(job, progress.step)
        if not saved and job.enough():
            job.save(progress)
            saved = True
    number = job.world.first(job.stop())
    if number is not None:
        if not saved:
            job.save(progress)
        raise Stopped(f"stopped after step {progress.step} of {job.steps}; --resume goes on from there", number)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _validate(job: Job, step: int) -> None:
    begun = time.perf_counter()
    job.progress(Doing("evaluation", step))
    with guards.memory(f"evaluation after step {step}"):
        batches, tell = job.batches.evaluation(), _telling(job, "evaluation", step)
        found = evaluate(job.question, batches, _device(job.parameters), job.stop, job.world, tell)
    if found is not None:
        named = {f"validation_{name}": value for name, value in found.items()}
        job.emit({"event": "evaluation", "step": step, **named, "seconds": time.perf_counter() - begun})
        if job.watch is not None:
            job.watch(step, found)


def evaluate(
    question: Question,
    batches: Iterable[Batch],
    device: torch.device | str,
    stop: Callable[[], int | None] = lambda: None,
    world: World = ALONE,
    tell: Tell = lambda done, tokens: None,
) -> dict[str, float] | None:
    """Loss and metrics over some batches, weighted as in training; None without batches, or when asked to stop.

    Dropout is off meanwhile. `tokens` counts the real tokens.
    """
    if question.objective.shared is not None:
        batches = list(batches)  # to be asked about twice
        question = question.about(takewhile(lambda batch: stop() is None, batches), device)
    losses, totals, tokens = dict[int, Loss](), [], 0
    with _evaluating(question.policy), torch.no_grad():
        for place, batch in enumerate(takewhile(lambda batch: stop() is None, counted(batches, tell))):
            totals.append(question.weights(batch))
            tokens += batch.real_tokens
            if world.owns(place) and any(totals[-1]):
                losses[place] = question.loss(batch.to(device))
    if world.first(stop()) is not None or not tokens:
        return None
    told = gathered(losses, world)
    if not told:
        raise DataError("no token of the validation rows is a label, so they have no loss; see data.validation")
    own = {"loss": total(told, sums(totals)), "tokens": tokens}
    return own | average(told) | question.judged([one.predictions for one in told]) | own


def _backward(
    question: Question,
    batches: Sequence[Batch],
    step: int,
    device: torch.device,
    world: World,
    tell: Tell = lambda done, tokens: None,
) -> tuple[float, dict[str, float]]:
    """Gradients of one optimizer step, each term divided once by its weight over all micro-batches."""
    weights = [question.weights(batch) for batch in batches]
    totals = sums(weights)
    if not any(totals):
        raise DataError(f"step {step}: none of its examples ({_examples(batches)}) has a label to learn from")
    question = question.about(batches, device)
    losses: dict[int, Loss] = {}
    for place, batch in enumerate(counted(batches, tell)):
        if not world.owns(place) or not any(weights[place]):
            continue  # another's, or nothing to learn here, and perhaps nothing to compute
        loss = question.loss(batch.to(device))
        shares = [t.coefficient * t.sum / total for t, total in zip(loss.terms, totals, strict=True) if total]
        torch.stack(shares).sum().backward()  # type: ignore[no-untyped-call]
        losses[place] = _detached(loss)
    told = gathered(losses, world)  # at the end, for to read a number makes a GPU wait
    return total(told, totals), average(told)


def _telling(job: Job, what: str, step: int, total: int | None = None) -> Tell:
    return lambda done, tokens: job.progress(Doing(what, step, done, total, tokens))


def _detached(loss: Loss) -> Loss:
    terms = tuple(term._replace(sum=term.sum.detach()) for term in loss.terms)
    return Loss(terms, {name: (s.detach(), n.detach()) for name, (s, n) in loss.metrics.items()})


def _skipped(job: Job, progress: Progress, loss: float, norm: float, lr: float, batches: Sequence[Batch]) -> int:
    """How many steps in a row have now been passed over, this one included; 0 where loss and gradient are finite.

    Raises TrainingError where that is more than may be.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return 0
    if progress.skipped < job.most_skipped:
        return progress.skipped + 1
    step = progress.step + 1
    job.emit({"event": "failure", "step": step, "loss": loss, "lr": lr, "grad_norm": norm})  # the log hides nothing
    before = f", after {progress.skipped} skipped steps in a row" if progress.skipped else ""
    raise TrainingError(
        f"step {step}{before}: the loss is {loss}, the gradient norm {norm} (lr {lr:.3g}, examples "
        f"{_examples(batches)}); stopped before the update, so earlier checkpoints are sound: "
        "lower train.learning_rate or look at these rows"
    )


def _examples(batches: Sequence[Batch]) -> str:
    found = list(dict.fromkeys(example for batch in batches for example in batch.examples))
    return ", ".join(map(str, found[:16])) + (f" and {len(found) - 16} more" if len(found) > 16 else "")


def _device(parameters: Mapping[str, Tensor]) -> torch.device:
    return next(iter(parameters.values())).device


@contextmanager
def _evaluating(policy: Answers) -> Iterator[None]:
    """Every module in eval mode; afterwards each one in its own mode again, for they need not be of one mind."""
    modules = list(policy.modules()) if isinstance(policy, nn.Module) else []
    before = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training
