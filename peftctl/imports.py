"""Importing the large libraries in three quarters of the time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Within it, torch and transformers are imported with Python's collector of cycles off.

    Modules are no garbage, but there are a million objects of them, which the collector would walk through time and
    again as they grow. At the end they are set aside, so that it never does.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
