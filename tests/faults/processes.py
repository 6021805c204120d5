"""Processes that are ended on purpose: forked, so that nothing is imported anew."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def in_child(work: Callable[[], Any]) -> int:
    """The exit code of a forked process that does `work`: negative for the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 0)
        except KeyboardInterrupt:
            os._exit(130)  # before the run listens: as the command line ends then
        except BaseException:
            os._exit(99)
        os._exit(0)
    sys.stderr.flush()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
