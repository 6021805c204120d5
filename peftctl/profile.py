"""Where a run's time goes: what share of it each part of a step takes, and a trace of a few warm steps.

The loop knows nothing of this. The callables that a job is made of are wrapped, and each marks where a part begins.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from peftctl.batch import Batch
from peftctl.objectives.base import Loss
from peftctl.trainer import Batches, Event, Job

PARTS = ("data", "forward", "backward", "optimizer", "other")
TRACED = (3, 5)  # the first and the last step of the trace, counted from where this process began


class Clock:
    """Seconds by part. A moment belongs to the part that was entered last; outside a step, to none."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.steps = 0  # done so far
        self.part: str | None = None
        self._device = device
        self._since = 0.0
        self._span: record_function | None = None  # the part's name in the trace

    def enter(self, part: str | None) -> None:
        """The current part ends here. What a device still has to do belongs to it."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        if self._span is not None:
            self._span.__exit__(None, None, None)
        now = time.perf_counter()
        if self.part is not None:
            self.seconds[self.part] += now - self._since
        self.part, self._since = part, now
        self._span = None if part is None else record_function(part)
        if self._span is not None:
            self._span.__enter__()  # type: ignore[no-untyped-call]

    def shares(self) -> dict[str, float]:
        """Each part of the whole, 1 together; nothing before a step was done."""
        total = sum(self.seconds.values())
        return {part: seconds / total for part, seconds in self.seconds.items()} if total else {}


class Tracer:
    """Traces a few steps of a job; `steps`: how many it will do in this process, as far as is known."""

    def __init__(self, steps: int) -> None:
        self.last = min(steps, TRACED[1])
        self.first = max(1, self.last - (TRACED[1] - TRACED[0]))
        self.steps: list[int] = []  # those in the trace
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its library writes its own steps to stderr else
        self._profiler = torch.profiler.profile()
        self._running = False
        self._profiler.prepare_trace()  # slow; here it is on no step's account

    def before(self, step: int) -> None:
        if step == self.first:
            self._start()

    def after(self, step: int) -> None:
        if self._running:
            self.steps.append(step)
            if step == self.last:
                self._stop()

    def write(self, path: Path) -> str:
        """End the trace, wherever the job was left; where it holds a step, write it. Answers what came of it."""
        if not self.steps and not self._running:
            self._start()  # what was prepared for must be started before it can be stopped
        if self._running:
            self._stop()
        if not self.steps:
            return "no step was traced"
        with suppress(OSError):  # an earlier run's must not pass for this one's
            path.unlink()
        self._profiler.export_chrome_trace(str(path))  # says on stderr why it cannot, and does not raise
        if not path.is_file():
            return f"{path} could not be written"
        return f"trace of {len(self.steps)} steps: {path}"

    def _start(self) -> None:
        self._profiler.start_trace()
        self._running = True

    def _stop(self) -> None:
        self._profiler.stop_trace()
        self._running = False


class _Batches:
    """Batches whose making is the part `data`; to ask for a step's begins it."""

    def __init__(self, batches: Batches, clock: Clock, begin: Callable[[], None]) -> None:
        self._batches, self._clock, self._begin = batches, clock, begin

    def step(self, position: int) -> tuple[Sequence[Batch], int]:
        self._begin()
        found = self._batches.step(position)
        self._clock.enter("other")
        return found

    def evaluation(self) -> Iterable[Batch]:
        return self._batches.evaluation()


@contextmanager
def profiled(job: Job, done: int, trace: Path, notice: Callable[[str], None]) -> Iterator[tuple[Job, Clock]]:
    """The job to run instead, which does the same bit for bit, and the clock that its steps fill.

    `done`: steps that the job has behind it. In the end, however it comes, the shares are told to `notice` and the
    trace is written to `trace`, in the form that chrome://tracing and Perfetto read.
    """
    clock = Clock(next(iter(job.parameters.values())).device)
    tracer = Tracer(job.steps - done)
    handles = (
        job.optimizer.register_step_pre_hook(lambda *_: clock.enter("optimizer")),
        job.optimizer.register_step_post_hook(lambda *_: clock.enter("other")),
    )
    try:
        yield _watched(job, clock, tracer), clock
    finally:
        for handle in handles:
            handle.remove()
        clock.enter(None)
        written = tracer.write(trace)
        if clock.steps:
            notice(f"profile  {_described(clock.shares())}  ({written})")


def _watched(job: Job, clock: Clock, tracer: Tracer) -> Job:
    objective = job.question.objective

    def begin() -> None:
        tracer.before(clock.steps + 1)
        clock.enter("data")

    def loss(*arguments: Any) -> Loss:
        if clock.part is None:  # an evaluation, which is not part of a step
            return objective.loss(*arguments)
        clock.enter("forward")
        found = objective.loss(*arguments)
        clock.enter("backward")  # up to the next micro-batch's loss, or the end of all
        return found

    def shared(*arguments: Any) -> Any:
        if clock.part is not None:
            clock.enter("forward")
        return objective.shared(*arguments) if objective.shared is not None else None

    def after_backward(step: int, total: int) -> None:
        clock.enter("other")
        job.after_backward(step, total)

    def emit(event: Event) -> None:
        if event["event"] == "step":
            clock.enter(None)
            clock.steps += 1
            tracer.after(clock.steps)
        job.emit(event)

    changed = {"loss": loss} | ({"shared": shared} if objective.shared is not None else {})
    return replace(
        job,
        question=replace(job.question, objective=replace(objective, **changed)),
        batches=_Batches(job.batches, clock, begin),
        after_backward=after_backward,
        emit=emit,
    )


def _described(shares: dict[str, float]) -> str:
    return "  ".join(f"{part} {share:.1%}" for part, share in shares.items())
