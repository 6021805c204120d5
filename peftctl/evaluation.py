"""What a policy is worth on a file: loss and perplexity by token, its own answers, or how a head of its own scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from peftctl import metrics, objectives, threads
from peftctl.batch import Batch
from peftctl.data.batches import each_once
from peftctl.data.dataset import load
from peftctl.data.encoded import Dataset, Report
from peftctl.data.formats import DESCRIBED, recognise
from peftctl.data.sides import chat_of
from peftctl.data.sources import read
from peftctl.errors import DataError, InputError
from peftctl.objectives.base import Answer, Objective
from peftctl.opened import Opened
from peftctl.reading import PLAIN, Reading
from peftctl.row import Row
from peftctl.surgery import device_of
from peftctl.task import Task

if TYPE_CHECKING:
    from peftctl.scored import Said

Progress = Callable[[int, int], None]


def evaluate(
    opened: Opened,
    file: str | Path,
    reading: Reading = PLAIN,
    progress: Progress = lambda done, total: None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Loss, tokens (labelled ones; perplexity where the loss is of them) and what else the objective of such data
    measures, of answers that are generated too.

    `progress` gets examples done and examples in all; `output`: a file for what is said of each row, by a task's head
    or as an answer. Raises DataError, InputError.
    """
    from peftctl.scored import write

    task = opened.found.base.task
    if output is not None and task is None and not reading.keys.get("metrics"):
        raise InputError("--output: this model predicts tokens and scores no rows; --metrics has answers to write")
    objective, config = _objective(file, task, reading)
    generated = objective.generates(config)
    opened = _told(opened, reading)
    dataset, report = _loaded(opened, file, objective, config, reading)
    said: list[Said] = []
    found = _measured_on(opened, dataset, objective, config, progress, said)
    if generated is not None and metrics.LENGTHS[0] not in found:
        raise DataError(f"{dataset.name}: no row has a prompt to answer; leave --metrics out for raw text")
    if output is not None:
        write(output, dataset, said if generated is None else _compared(said, generated.metrics))
    loss = found.pop("loss")
    rest = {name: value for name, value in found.items() if name != "tokens"}
    likelihood = {"perplexity": math.exp(min(loss, 700))} if objective.likelihood else {"examples": len(dataset)}
    tokens = report.labelled_tokens if task is None else report.tokens
    changed = {name: count for name in ("refused", "truncated") if (count := getattr(report, name))}
    return {"loss": loss, **likelihood, "tokens": tokens, **rest, **changed}


def _measured_on(
    opened: Opened, dataset: Dataset, objective: Objective[Any], config: Any, progress: Progress, said: list[Said]
) -> dict[str, float]:
    """What is measured, and in `said` what was said of each row."""
    from peftctl.answered import answering
    from peftctl.scored import Kept
    from peftctl.trainer import Question
    from peftctl.trainer import evaluate as measure

    def heard(row: Row, answer: Answer, right: str) -> None:
        said.append((row.example, 0, {"generated": answer.text, "answer": right, "ended": answer.ended}))

    task, layout = opened.found.base.task, opened.policy.layout.name
    asked = answering(objective, config, opened.policy, opened.chat, opened.found.base.positions, heard)
    policy: Any = opened.policy if task is None else Kept(opened.policy, task, said)
    parts = each_once(dataset, padded=layout == "padded", trim=layout == "shared")
    batches = _watched(parts, len(dataset), progress)
    device = device_of(opened.policy.model)
    with threads.bind_main(device.type):
        found = measure(Question(asked, config, policy), batches, device)
    assert found is not None  # `load` refuses a file without rows
    return found


def _compared(said: list[Said], names: tuple[str, ...]) -> Iterator[Said]:
    """What was said, with what is measured of each answer by itself."""
    answers, right = ([str(more[key]) for _, _, more in said] for key in ("generated", "answer"))
    for (example, place, more), scores in zip(said, metrics.of_each(answers, right, names), strict=True):
        yield example, place, {**more, **scores}


def _told(opened: Opened, reading: Reading) -> Opened:
    """With the moment that the run's chat template was told."""
    if reading.now is None:
        return opened
    found = opened.found
    return opened._replace(chat=chat_of(found.base.start(), found.tokenizer, None, reading.now))


def _loaded(
    opened: Opened, file: str | Path, objective: Objective[Any], config: Any, reading: Reading
) -> tuple[Dataset, Report]:
    return load(
        file,
        opened.chat,
        objective,
        config,
        format=reading.format,
        columns=reading.columns,
        max_length=reading.max_length,
        truncate=reading.truncate,
        on_bad_row=reading.on_bad_row,
        vocabulary=opened.found.skeleton.dimensions.vocabulary,
    )


def _watched(batches: Iterable[Batch], total: int, progress: Progress) -> Iterator[Batch]:
    done = 0
    for batch in batches:
        yield batch
        done += len(set(batch.examples))
        progress(done, total)


def _objective(file: str | Path, task: Task | None, reading: Reading) -> tuple[Objective[Any], Any]:
    """The objective whose loss on such rows tells a perplexity, or what a head is worth; with its config."""
    measured = list(_measured(task))
    kinds = {kind for one, _ in measured for kind in one.kinds}
    try:
        kind = recognise(read(file, 1), reading.format, reading.columns, kinds).kind
    except DataError as error:
        if reading.recipe is None or not str(error).startswith("data.columns"):
            raise
        raise DataError(f"{error}; {reading.recipe} says so, and --column OURS=THEIRS says otherwise") from None
    for objective, keys in measured:
        if kind in objective.kinds:
            return objective, _config(objective, keys, reading)
    wanted = "give dialogues, or prompt and completion, to measure a loss"
    if task is not None:
        described = " or ".join(DESCRIBED[kind] for kind in sorted(kinds))
        wanted = f"a {task.name} of {len(task.labels)} labels is measured on {described}"
    raise DataError(f"{file} holds {DESCRIBED[kind]}; {wanted}")


def _config(objective: Objective[Any], keys: dict[str, Any], reading: Reading) -> Any:
    if reading.keys.get("metrics") and "metrics" not in objective.reading:
        raise InputError(
            "--metrics: a model with a head of a task generates no answers; what its head says is measured"
        )
    try:
        return objective.config(name=objective.name, **keys, **reading.keys_of(objective))
    except ValidationError as error:
        raise InputError(f"--metrics: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def _measured(task: Task | None) -> Iterator[tuple[Objective[Any], dict[str, Any]]]:
    """The objectives that can measure a base asked for that, each with the keys of its config."""
    for objective in map(objectives.get, objectives.names()):
        if task is None and objective.likelihood:
            yield objective, {}
        elif task is not None and objective.task == task.name:
            keys = objective.measures(task.labels)
            if keys is not None:
                yield objective, dict(keys)
