"""Loss and perplexity of a policy on a file, weighted by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from peftctl import objectives
from peftctl.batch import Batch
from peftctl.data.batches import each_once
from peftctl.data.dataset import load
from peftctl.data.formats import DESCRIBED, recognise
from peftctl.data.sources import read
from peftctl.errors import DataError
from peftctl.opened import Opened
from peftctl.surgery import device_of

Progress = Callable[[int, int], None]


def evaluate(
    opened: Opened, file: str | Path, max_length: int, progress: Progress = lambda done, total: None
) -> dict[str, Any]:
    """Loss, perplexity, tokens (labelled ones) and what else the objective of such data measures. Raises DataError.

    `progress` gets examples done and examples in all.
    """
    from peftctl.trainer import Question
    from peftctl.trainer import evaluate as measure

    objective = _objective(file)
    config = objective.config(name=objective.name)
    vocabulary = opened.found.skeleton.dimensions.vocabulary
    dataset, report = load(file, opened.chat, objective, config, max_length=max_length, vocabulary=vocabulary)
    layout = opened.policy.layout.name
    parts = each_once(dataset, padded=layout == "padded", trim=layout == "shared")
    batches = _watched(parts, len(dataset), progress)
    found = measure(Question(objective, config, opened.policy), batches, device_of(opened.policy.model))
    assert found is not None  # `load` refuses a file without rows
    loss = found.pop("loss")
    rest = {name: value for name, value in found.items() if name != "tokens"}
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": report.labelled_tokens, **rest}


def _watched(batches: Iterable[Batch], total: int, progress: Progress) -> Iterator[Batch]:
    done = 0
    for batch in batches:
        yield batch
        done += len(set(batch.examples))
        progress(done, total)


def _objective(file: str | Path) -> Any:
    """The objective whose loss on such rows tells a perplexity."""
    measured = [objective for objective in map(objectives.get, objectives.names()) if objective.likelihood]
    kind = recognise(read(file, 1), wanted={kind for objective in measured for kind in objective.kinds}).kind
    for objective in measured:
        if kind in objective.kinds:
            return objective
    raise DataError(f"{file} holds {DESCRIBED[kind]}; give dialogues, or prompt and completion, to measure a loss")
