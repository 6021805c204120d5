"""A run: from a recipe to a folder that proves what happened. The composition root; nothing here is an algorithm."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peftctl import base as bases
from peftctl import checkpoint, jobs, lock, methods, room, signals, standin, threads
from peftctl import model as models
from peftctl.checkpoint import Progress, State
from peftctl.compute import AUTO
from peftctl.display import display
from peftctl.distributed import World, joined, local_rank
from peftctl.errors import Stopped, Unfoldable
from peftctl.feeding import batches_of
from peftctl.formats import peft
from peftctl.kernels.stored import computed_type, stored_type
from peftctl.loading import Training, load
from peftctl.merging import merge
from peftctl.plan import Options, Plan, plan, without_tokens
from peftctl.policy import Policy
from peftctl.profile import profiled
from peftctl.proof import Proof, prove
from peftctl.remembered import Remembered
from peftctl.report import Log, read, tee, truncate
from peftctl.reuse import Reuse
from peftctl.run_folder import RunFolder, peak_memory_bytes, written_aside
from peftctl.schema import Recipe
from peftctl.surgery import device_of
from peftctl.trainer import Job
from peftctl.trainer import train as loop
from peftctl.waiting import loading
from peftctl.watch import back_to_best


def train(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Train a recipe and answer what came out. Raises InputError before any time is spent, TrainingError, Stopped.

    Of several processes the first answers; the others compute their part and write nothing.
    """
    with joined() as world:
        return _lead(recipe, options, world) if world.leads else _follow(recipe, options, world)


def _lead(recipe: Recipe, options: Options, world: World) -> dict[str, Any]:
    begun = time.perf_counter()
    folder = RunFolder(Path(recipe.output), options)
    if folder.document.get("status") != "finished":  # whose result can be told again without a word written
        lock.check(folder.path)
    planned = plan(recipe, options._replace(now=folder.now()))
    if options.resume and folder.finished(planned):
        world.gather(None)
        return folder.result()
    with (
        lock.held(folder.path),
        signals.caught() as stop,
        display(planned.steps, options.quiet) as shown,
        ExitStack() as computing,
    ):
        shown.notice(f"training {planned.counts.trainable:,} parameters ({planned.counts.summary})")
        for line in [*filter(None, [standin.note(planned.recipe, planned.base)]), *planned.data.notes()]:
            shown.notice(line)
        room.check(planned, folder.path, shown.notice)
        state = folder.open(planned, options, shown.notice)
        _same_threads(folder.choice("threads"), shown.notice)
        shown.working(loading(planned.base.name))
        random_base = planned.base.weights is None
        planned = _with_weights(planned, folder)
        computing.enter_context(threads.bind_main(models.device(planned.recipe.train.device)))
        training = load(planned, folder, state, options, shown.notice)
        _exactness(next(training.policy.model.parameters()).device.type, shown.notice)
        _packing(training.policy, shown.notice)
        batches = batches_of(planned, training.policy, world, {} if state is None else state.facts)
        kept = jobs.kept(planned, training, batches, folder, shown.notice)
        folder.record(planned, training.policy.layout, _choices(training, kept), random_base)
        filled = [one for one in kept if one.fill(stop, shown.notice)]
        if len(filled) < len(kept):
            folder.record(planned, training.policy.layout, _choices(training, filled), random_base)
        world.gather({"checkpoint": _origin(folder, state, options)})
        log = folder.path / "metrics.jsonl"
        truncate(log, training.progress.step)
        with Log(log) as lines, ExitStack() as serving:
            for one in filled:
                serving.enter_context(one.served())
            save = partial(jobs.save, folder, training, batches, lines, recipe.train.keep)
            emit = jobs.begun(planned, training, tee(lines, shown), shown.notice)
            job = replace(jobs.job(planned, training, batches, stop, world, emit, save), progress=shown.progress)
            progress, shares = _followed(folder, job, training.progress, options.profile, shown.notice)
        best = back_to_best(training.watch, training.attachment, progress.step < planned.steps, shown.notice)
        written = _write(planned, folder, training)
        proof = prove(training.policy, training.start, planned, written) if options.verify else None
        merged = _merged(folder, written, shown.notice) if random_base else None
    # the last of each kind; a skipped step has no loss to speak of
    events = {event["event"]: event for event in read(log) if "skipped" not in event}
    result = _result(folder, written, progress, events, proof, merged, time.perf_counter() - begun) | best
    return folder.finish(result if shares is None else result | {"profile": shares})


def _follow(recipe: Recipe, options: Options, world: World) -> dict[str, Any]:
    """One of the other processes: what the leader has decided is read in its folder."""
    told = world.gather(None)[0]
    if told is None:
        return {}
    folder = RunFolder(Path(recipe.output), options._replace(resume=True, resume_from=None))
    planned = _with_weights(plan(recipe, options._replace(now=folder.now())), folder)
    if str(folder.choice("device")).startswith("cuda"):
        settings = planned.recipe.train.model_copy(update={"device": f"cuda:{local_rank()}"})
        planned = planned._replace(recipe=planned.recipe.model_copy(update={"train": settings}))
    _same_threads(folder.choice("threads"), _ignore)
    state = checkpoint.load(Path(told["checkpoint"])) if told["checkpoint"] else None
    with signals.caught() as stop, ExitStack() as serving:
        serving.enter_context(threads.bind_main(models.device(planned.recipe.train.device)))
        training = load(planned, folder, state, options, _ignore)
        batches = batches_of(planned, training.policy, world, {} if state is None else state.facts)
        for one in jobs.kept(planned, training, batches, folder, _ignore):
            if one.fill(stop, _ignore):
                serving.enter_context(one.served())
        loop(jobs.job(planned, training, batches, stop, world, _ignore, _ignore), training.progress)
    return {}


def _ignore(told: object) -> None:
    pass


def _origin(folder: RunFolder, state: State | None, options: Options) -> str | None:
    """The checkpoint that a run goes on from."""
    if state is None:
        return None
    return options.resume_from or str(checkpoint.folder(folder.path, state.progress.step))


def _exactness(device: str, notice: Callable[[str], None]) -> None:
    """The CPU's kernels add in one order; some of an accelerator's add in that in which they get ready."""
    if device != "cpu":
        notice(f"on {device} some kernels are not deterministic: the last bits may differ from run to run")


def _packing(policy: Policy, notice: Callable[[str], None]) -> None:
    """Tell a recipe that asks for `train.pack_weights` in vain."""
    if not policy.packed or policy.packs:
        return
    model = policy.model
    stored, device = str(stored_type(model)).removeprefix("torch."), device_of(model).type
    why = f"no frozen {stored} matrix can be packed on this {device}"
    if stored_type(model) is not computed_type(model):
        why = f"matrices stored in {stored} are widened when they are multiplied"
    notice(f"train.pack_weights has no effect: {why}")


def _same_threads(before: int | None, notice: Callable[[str], None]) -> None:
    """As many threads as the run began with: the order of sums, and so the last bits, depend on it."""
    now = torch.get_num_threads()
    if before is not None and before != now:
        notice(f"using {before} threads as the run did so far, not {now}, for equal bits")
        torch.set_num_threads(before)


def _followed(
    folder: RunFolder, job: Job, progress: Progress, profile: bool, notice: Callable[[str], None]
) -> tuple[Progress, dict[str, float] | None]:
    """Run the loop; with `profile`, also what share of the time each part of its steps took."""
    if not profile:
        return _stoppable(folder, job, progress), None
    with profiled(job, progress.step, folder.path / "trace.json", notice) as (watched, clock):
        return _stoppable(folder, watched, progress), clock.shares()


def _stoppable(folder: RunFolder, job: Job, progress: Progress) -> Progress:
    try:
        return loop(job, progress)
    except Stopped:
        folder.stopped()
        raise


def _with_weights(planned: Plan, folder: RunFolder) -> Plan:
    """A bare architecture gets its random weights, kept in the run's folder: the adapter must find them again."""
    if planned.base.weights is not None:
        return planned
    target = folder.path / "base"
    if not target.is_dir():
        base, chat = without_tokens(planned)
        model = models.load(base, AUTO, "cpu", planned.recipe.train.seed)
        with written_aside(target) as temporary:
            model.save_pretrained(temporary)
            chat.save(temporary)
    found = bases.resolve(str(target.resolve()))
    return planned._replace(base=found._replace(task=planned.base.task, rows=planned.base.rows))


def _choices(training: Training, kept: Sequence[Reuse | Remembered]) -> dict[str, Any]:
    """What was decided without being asked."""
    model = training.policy.model
    return {
        "device": str(device_of(model)),
        "dtype": str(stored_type(model)).removeprefix("torch."),
        "compute_dtype": str(computed_type(model)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "router_loss": training.policy.balance.coefficient if training.policy.balance is not None else 0.0,
        "frozen_blocks": sum(one.frozen.count for one in kept if isinstance(one, Reuse)),
        "remembered_reference": any(isinstance(one, Remembered) for one in kept),
    }


def _merged(folder: RunFolder, adapter: Path, notice: Callable[[str], None]) -> dict[str, Any] | None:
    """A smoke run proves the merge as well, where the method has one."""
    shutil.rmtree(folder.path / "merged", ignore_errors=True)
    try:
        return merge([str(adapter)], folder.path / "merged")
    except Unfoldable as refusal:
        notice(f"not merged: {refusal}")
        return None


def _result(
    folder: RunFolder,
    adapter: Path,
    progress: Progress,
    events: dict[str, Any],
    proof: Proof | None,
    merged: dict[str, Any] | None,
    seconds: float,
) -> dict[str, Any]:
    """What `train --json` prints."""
    step, evaluation = events.get("step", {}), events.get("evaluation", {})
    return {
        "run": str(folder.path),
        "adapter": str(adapter),
        "steps": progress.step,
        "tokens": progress.tokens,
        "train_loss": step.get("loss"),
        "validation_loss": evaluation.get("validation_loss"),
        "tokens_per_s": progress.tokens / progress.seconds if progress.seconds else None,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "proof": proof._asdict() if proof is not None else None,
        "merged": merged,
    }


def _write(planned: Plan, folder: RunFolder, training: Training) -> Path:
    """The result: the adapter's folder, as other tools load it, with the tokenizer and template that were used."""
    method, config = methods.get(planned.recipe.method.name), planned.recipe.method
    target = folder.path / "adapter"
    with written_aside(target) as temporary:
        peft.write(temporary, method, config, planned.skeleton, training.attachment.written(), planned.base)
        planned.chat.save(temporary)
    return target
