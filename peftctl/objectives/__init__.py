"""The objectives, found by their files: nothing to register, nothing to keep in sync."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from peftctl.errors import InputError, suggest
from peftctl.objectives.base import Objective


def names() -> list[str]:
    """The names of all objectives, without importing one. A file `a_b.py` is the objective `a-b`."""
    return sorted(p.stem.replace("_", "-") for p in Path(__file__).parent.glob("[a-z]*.py") if p.stem != "base")


def get(name: str) -> Objective[Any]:
    """The objective of that name; imports that one alone. Raises InputError for an unknown name."""
    if name not in names():
        raise InputError(f"there is no objective {name!r}{suggest(name, names())} There are: {', '.join(names())}")
    objective: Objective[Any] = import_module(f"{__name__}.{name.replace('-', '_')}").OBJECTIVE
    return objective
