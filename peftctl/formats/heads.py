"""A task's head in an adapter's folder: its modules' names, and a config.json that names its labels.

That config is the base's, so that AutoConfig reads it and AutoModelForSequenceClassification builds the model from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftctl.base import Base
from peftctl.errors import FormatError
from peftctl.formats.shards import read as read_header
from peftctl.skeleton import Skeleton
from peftctl.task import Task, labelled, task_of

CONFIG = "config.json"
TYPES = {"SEQ_CLS": "sequence-classification", "TOKEN_CLS": "token-classification"}  # peft's words
# how the linear that ends a head is called, across families
LAST = ("score.weight", "classifier.weight", "classifier.out_proj.weight")


def tops(skeleton: Skeleton) -> list[str]:
    """The outermost modules of the head: what peft is told to save."""
    paths = [module.path for module in skeleton.added]
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


def write(folder: Path, base: Base, skeleton: Skeleton) -> None:
    """Nothing is written where there is no head. Raises OSError."""
    if base.task is not None:
        kept = {key: value for key, value in base.settings().items() if key not in ("num_labels", "problem_type")}
        config = kept | labelled(base.task) | {"architectures": [skeleton.architecture]}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def read(folder: Path, keys: Mapping[str, Any], weights: Path, base: Base) -> Task | None:
    """What an adapter was trained for; `keys` of its adapter_config.json. Raises FormatError.

    Without a config.json, as other programs leave it, the labels are counted in the weights and named by the base.
    """
    name = TYPES.get(str(keys.get("task_type")))
    own = task_of(_settings(folder / CONFIG)) if (folder / CONFIG).is_file() else None
    if own is not None or name is None:
        return own
    rows = [entry.shape[0] for entry in read_header(weights).entries if entry.name.endswith(LAST)]
    if len(rows) != 1:
        raise FormatError(
            f"{folder}: task_type is {keys['task_type']}, but no head's output is found in {weights.name}"
        )
    names = base.settings().get("id2label") or {}
    known = len(names) == rows[0]
    return Task(name, tuple(str(names[str(i)]) if known and str(i) in names else f"LABEL_{i}" for i in range(rows[0])))


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path} is not a config: it holds no keys")
    return found
