"""SIGTERM and SIGINT: a question the loop asks when it suits it, elsewhere an end that cleans up behind itself."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Stop = Callable[[], "int | None"]  # the number of the signal that asked to stop

_NOTICE = b"\nfinishing the step and saving; a second Ctrl-C leaves at once\n"


@contextmanager
def caught() -> Iterator[Stop]:
    """For the length of a `with`, signals are remembered instead of ending the process; a second SIGINT ends it."""
    asked: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in asked:
            os._exit(128 + signal.SIGINT)
        if number == signal.SIGINT:
            os.write(2, _NOTICE)  # not print: a handler may run in the middle of another write
        asked.append(number)

    def stop() -> int | None:
        return asked[0] if asked else None

    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may install handlers
        return
    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def terminable() -> Iterator[None]:
    """For the length of a `with`, SIGTERM raises SystemExit as SIGINT does KeyboardInterrupt; a second one kills."""

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield  # somebody else has plans for it
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
