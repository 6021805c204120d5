"""Processes that are ended on purpose: forked, so that nothing is imported anew."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

LONGEST = 900.0  # seconds that a child is waited for: a machine may be suspended


class Kill(NamedTuple):
    """A signal that is sent so many seconds after a line was told; after the start, where the line is empty."""

    number: int
    seconds: float
    line: str = ""


class Watched(NamedTuple):
    code: int  # negative for the signal that ended the child
    lines: list[str]  # what it told


def in_child(work: Callable[[], Any]) -> int:
    """The exit code of a forked process that does `work`: negative for the signal that ended it."""
    return ended(begun(work))


def watched(work: Callable[[Callable[[str], None]], Any], kill: Kill | None = None) -> Watched:
    """Fork a process that does `work`, which is given what tells a line, and send it a signal."""
    ours, theirs = os.pipe()
    child = begun(lambda: work(lambda line: os.write(theirs, f"{line}\n".encode())))
    os.close(theirs)
    said, last = b"", time.monotonic() + LONGEST
    due = time.monotonic() + kill.seconds if kill and not kill.line else None
    while True:
        wait = min(last, due or last) - time.monotonic()
        if select.select([ours], [], [], max(0.0, wait))[0]:
            block = os.read(ours, 1 << 16)
            if not block:
                break  # the child has ended
            said += block
            if kill and due is None and kill.line.encode() in said.splitlines():
                due = time.monotonic() + kill.seconds
        else:
            os.kill(child, kill.number if kill and due else signal.SIGKILL)
            kill = due = None
    os.close(ours)
    return Watched(ended(child), said.decode().splitlines())


def ended(child: int) -> int:
    """The exit code of a forked process, once it has ended: negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def begun(work: Callable[[], Any]) -> int:
    """Fork a process that does `work`; its number."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    child = os.fork()
    if child:
        return child
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
        work()
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 0)
    except KeyboardInterrupt:
        os._exit(130)  # before the run listens: as the command line ends then
    except BaseException:
        os._exit(99)
    os._exit(0)
