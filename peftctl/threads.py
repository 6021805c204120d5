"""OpenMP's threads, each held to a processor of its own while a run computes. Torch-free.

At the end of every product its threads wait for the slowest, by spinning. A thread that spins looks as busy as one that
computes: with another process beside a run, the system leaves two of the run's threads on one processor for good, and
each product takes as long as the system lets the spinning one go on. Held threads cannot meet so. Binding changes when
a sum is computed and not its order, so no bit of a result depends on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

_OWN = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")  # by which a user says it otherwise
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

_place: frozenset[int] = frozenset()  # where OpenMP put the main thread; nothing where threads are not bound


def usable() -> list[int]:
    """The numbers of the processors that this thread may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def settings(environment: Mapping[str, str], processors: Sequence[int]) -> dict[str, str]:
    """The variables that bind OpenMP's threads; none where the user has set one, or leaves processors free.

    `processors`: numbers of those that may be used. Of several processes on a machine (LOCAL_RANK, LOCAL_WORLD_SIZE)
    each has a share of them. Threads that are fewer than the processors are not bound: those of another run would be
    bound to the same ones.
    """
    if any(name in environment for name in _OWN):
        return {}
    rank, size = (_number(environment.get(name)) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    size = size or 1
    counts = [count for name in _COUNTS if (count := _number(environment.get(name))) is not None]
    threads = min([len(processors) // size, *counts])
    if threads < 2 or threads * size < len(processors):
        return {}
    if size == 1:
        return {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}
    own = processors[(rank or 0) * threads :][:threads]
    return {"OMP_PROC_BIND": "close", "OMP_PLACES": ",".join(f"{{{number}}}" for number in own)}


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdecimal() else None


@contextmanager
def binding() -> Iterator[None]:
    """Within it OpenMP's library is loaded, which reads its variables then, and binds the main thread at once.

    Afterwards the variables are gone, for processes that are started later are not to crowd on the same processors, and
    the main thread is free again until it is bound by `bind_main`.
    """
    global _place
    before = usable()
    chosen = settings(os.environ, before) if hasattr(os, "sched_setaffinity") else {}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name in chosen:
            del os.environ[name]
        if chosen and usable() != before:
            _place = frozenset(usable())
            os.sched_setaffinity(0, before)


@contextmanager
def bind_main(device: str) -> Iterator[None]:
    """For the length of a `with` the main thread is bound as the others are, where they are, if `device` is the CPU.

    Threads and processes that it starts meanwhile share its processor.
    """
    if not _place or device != "cpu":
        yield
        return
    before = usable()
    os.sched_setaffinity(0, _place)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
