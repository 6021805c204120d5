"""Importing large libraries: Python's collector of cycles rests meanwhile, and its generator stays where it was."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from peftctl import threads


@contextmanager
def unswept() -> Iterator[None]:
    """Within it the collector rests: it would walk through all that is being made time and again."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """The same for the import of torch and transformers, a quarter of whose time the collector would take.

    They make a million objects, which are set aside at the end, so that the collector never walks through them.
    """
    if "torch" in sys.modules:
        yield
        return
    with unswept():
        try:
            with threads.binding():
                import_module("torch")
            yield
        finally:
            gc.freeze()


def undrawn(name: str) -> Any:
    """A module, imported without a draw from Python's generator: a run must not depend on when that happens."""
    state = random.getstate()
    try:
        return import_module(name)
    finally:
        random.setstate(state)
