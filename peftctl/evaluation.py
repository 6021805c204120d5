"""Loss and perplexity of a policy on a file, weighted by token."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from peftctl import objectives
from peftctl.data.batches import in_order
from peftctl.data.dataset import load
from peftctl.data.formats import recognise
from peftctl.data.sources import read
from peftctl.errors import DataError
from peftctl.opened import Opened
from peftctl.surgery import device_of

BATCH = 8


def evaluate(opened: Opened, file: str | Path, max_length: int) -> dict[str, Any]:
    """Loss, perplexity, tokens (labelled ones) and what else the objective of such data measures. Raises DataError."""
    from peftctl.trainer import Question
    from peftctl.trainer import evaluate as measure

    objective = _objective(recognise(read(file, 1)).kind, file)
    config = objective.config(name=objective.name)
    if objective.reference(config) is not None:
        raise DataError(f"{file} holds preference pairs; give dialogues, or prompt and completion, to measure a loss")
    vocabulary = opened.found.skeleton.dimensions.vocabulary
    dataset, report = load(file, opened.chat, objective, config, max_length=max_length, vocabulary=vocabulary)
    found = measure(
        Question(objective, config, opened.policy), in_order(dataset, BATCH), device_of(opened.policy.model)
    )
    assert found is not None  # `load` refuses a file without rows
    loss = found.pop("loss")
    rest = {name: value for name, value in found.items() if name != "tokens"}
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": report.labelled_tokens, **rest}


def _objective(kind: str, file: str | Path) -> Any:
    for name in objectives.names():
        objective = objectives.get(name)
        if kind in objective.kinds:
            return objective
    raise DataError(f"{file}: no objective learns from {kind}")
