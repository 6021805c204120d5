"""The room that a run's checkpoints and its adapter take on the disk, looked at before a weight is read."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

from peftctl import objectives
from peftctl.errors import InputError
from peftctl.plan import Plan

# what an optimizer remembers, in bytes of the parameters; adafactor keeps rows and columns alone
REMEMBERED = {"adamw": 2, "sgd": 1, "adafactor": 0}


def check(planned: Plan, folder: Path, notice: Callable[[str], None]) -> None:
    """Refuse a run whose first checkpoint cannot fit, with InputError; give notice where later ones may not."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    adapter, one = sizes(planned)
    if free < adapter + one:
        raise InputError(
            f"output: a checkpoint and the adapter need some {adapter + one:,} bytes, {free:,} are free at {place}: "
            "free some, or name a folder on another disk"
        )
    held = len(list((folder / "checkpoints").glob("step-*")))
    most = adapter + one * max(1, _at_once(planned) - held)
    if free < most:
        notice(
            f"the checkpoints may need some {most:,} bytes, {free:,} are free at {place}: "
            "lower train.keep, or name a folder on another disk"
        )


def sizes(planned: Plan) -> tuple[int, int]:
    """Bytes of the adapter and of one checkpoint: trained parameters in fp32, moments, a frozen reference, the best."""
    recipe = planned.recipe
    adapter = 4 * planned.counts.trainable
    frozen = objectives.get(recipe.objective.name).reference(recipe.objective) == "initial"
    return adapter, adapter * (1 + REMEMBERED[recipe.train.optimizer] + frozen + recipe.train.keep_best)


def _at_once(planned: Plan) -> int:
    """Checkpoints that are there at one time: a new one is whole before the oldest goes."""
    settings = planned.recipe.train
    saves = math.ceil(planned.steps / settings.save_every) if settings.save_every else 1
    return min(settings.keep + 1, saves)
