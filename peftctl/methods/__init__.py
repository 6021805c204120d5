"""The methods, found by their folders: nothing to register, nothing to keep in sync."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from peftctl.errors import InputError, suggest
from peftctl.methods.base import Method


def names() -> list[str]:
    """The names of all methods, without importing one. A folder `p_tuning` is the method `p-tuning`."""
    found = [p for root in __path__ for p in Path(root).glob("[a-z]*/__init__.py")]
    return sorted(p.parent.name.replace("_", "-") for p in found)


def get(name: str) -> Method[Any]:
    """The method of that name; imports that one alone. Raises InputError for an unknown name."""
    if name not in names():
        raise InputError(f"there is no method {name!r}{suggest(name, names())} There are: {', '.join(names())}")
    method: Method[Any] = import_module(f"{__name__}.{name.replace('-', '_')}").METHOD
    return method
