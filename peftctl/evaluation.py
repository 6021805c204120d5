"""What a policy is worth on a file: loss and perplexity by token, or how a head of its own scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftctl import objectives
from peftctl.batch import Batch
from peftctl.data.batches import each_once
from peftctl.data.dataset import load
from peftctl.data.formats import DESCRIBED, recognise
from peftctl.data.sources import read
from peftctl.errors import DataError, InputError
from peftctl.objectives.base import Objective
from peftctl.opened import Opened
from peftctl.surgery import device_of
from peftctl.task import Task

if TYPE_CHECKING:
    from peftctl.scored import Kept

Progress = Callable[[int, int], None]


def evaluate(
    opened: Opened,
    file: str | Path,
    max_length: int,
    progress: Progress = lambda done, total: None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Loss, tokens (labelled ones; perplexity where the loss is of them) and what else the objective of such data
    measures.

    `progress` gets examples done and examples in all; `output`: a file for what a task's head says of each row. Raises
    DataError, InputError.
    """
    from peftctl.trainer import Question
    from peftctl.trainer import evaluate as measure

    task = opened.found.base.task
    if output is not None and task is None:
        raise InputError("--output: only a model with a head of a task scores rows; this one predicts tokens")
    objective, config = _objective(file, task)
    vocabulary = opened.found.skeleton.dimensions.vocabulary
    dataset, report = load(file, opened.chat, objective, config, max_length=max_length, vocabulary=vocabulary)
    layout = opened.policy.layout.name
    parts = each_once(dataset, padded=layout == "padded", trim=layout == "shared")
    batches = _watched(parts, len(dataset), progress)
    policy: Any = opened.policy if output is None else _keeping(opened)
    found = measure(Question(objective, config, policy), batches, device_of(opened.policy.model))
    assert found is not None  # `load` refuses a file without rows
    if output is not None:
        policy.write(output, dataset)
    loss = found.pop("loss")
    rest = {name: value for name, value in found.items() if name != "tokens"}
    likelihood = {"perplexity": math.exp(min(loss, 700))} if objective.likelihood else {"examples": len(dataset)}
    return {"loss": loss, **likelihood, "tokens": report.labelled_tokens if task is None else report.tokens, **rest}


def _keeping(opened: Opened) -> Kept:
    from peftctl.scored import Kept

    assert opened.found.base.task is not None
    return Kept(opened.policy, opened.found.base.task)


def _watched(batches: Iterable[Batch], total: int, progress: Progress) -> Iterator[Batch]:
    done = 0
    for batch in batches:
        yield batch
        done += len(set(batch.examples))
        progress(done, total)


def _objective(file: str | Path, task: Task | None) -> tuple[Objective[Any], Any]:
    """The objective whose loss on such rows tells a perplexity, or what a head is worth; with its config."""
    measured = list(_measured(task))
    kind = recognise(read(file, 1), wanted={kind for one, _ in measured for kind in one.kinds}).kind
    for objective, keys in measured:
        if kind in objective.kinds:
            return objective, objective.config(name=objective.name, **keys)
    wanted = "give dialogues, or prompt and completion, to measure a loss"
    if task is not None:
        kinds = " or ".join(DESCRIBED[kind] for kind in sorted({kind for one, _ in measured for kind in one.kinds}))
        wanted = f"a {task.name} of {len(task.labels)} labels is measured on {kinds}"
    raise DataError(f"{file} holds {DESCRIBED[kind]}; {wanted}")


def _measured(task: Task | None) -> Iterator[tuple[Objective[Any], dict[str, Any]]]:
    """The objectives that can measure a base asked for that, each with the keys of its config."""
    for objective in map(objectives.get, objectives.names()):
        if task is None and objective.likelihood:
            yield objective, {}
        elif task is not None and objective.task == task.name:
            keys = objective.measures(task.labels)
            if keys is not None:
                yield objective, dict(keys)
