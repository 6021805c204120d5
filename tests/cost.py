"""What work costs, to be compared with what other work costs, never with a clock: machines differ, and so do days."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable


def seconds(work: Callable[[], object], trials: int = 3) -> float:
    """Processor seconds of the cheapest of a few trials: the collector may come by in one."""
    took = []
    for _ in range(trials):
        begun = time.process_time()
        work()
        took.append(time.process_time() - begun)
    return min(took)


def seconds_of_children(work: Callable[[], object]) -> float:
    """Processor seconds of the processes that some work starts and waits for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
