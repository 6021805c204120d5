"""Encoding many rows in several processes, each row once and in order; the answer is the same as that of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from queue import SimpleQueue
from typing import Any

from peftctl.data.encoding import LENGTH, Chunk, Given, Job, chunk_of, encode, message

SECONDS = 1.0  # of work before processes are started, each of which takes half a second to be ready
# not `-m`, which would let files of the current folder stand in for modules
CODE = "import sys; sys.path[:] = sys.argv[1:]; from peftctl.data.worker import main; main()"

Batch = Sequence[Given]


def chunks(job: Job, batches: Iterable[Batch], long: Callable[[float, int], bool]) -> Iterator[Chunk]:
    """The chunks of all batches, in order. `long` is asked, after so many seconds and rows, whether much is left."""
    batches, begun, done = iter(batches), time.perf_counter(), 0
    for batch in batches:
        spent = time.perf_counter() - begun
        document = job.document() if spent > SECONDS and long(spent, done) else None
        if document is not None and processors() > 1:
            yield from _together(job, document, chain([batch], batches))
            return
        yield encode(job, batch)
        done += len(batch)


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _together(job: Job, document: dict[str, Any], batches: Iterable[Batch]) -> Iterator[Chunk]:
    count = processors()
    workers = [Worker(document) for _ in range(count)]
    free: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def answer(batch: Batch) -> Chunk:
        worker = free.get()
        try:
            return worker.ask(batch) or encode(job, batch)
        finally:
            free.put(worker)

    pool = ThreadPoolExecutor(count)
    pending: deque[Future[Chunk]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(answer, batch))
            if len(pending) > 2 * count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.end()


class Worker:
    """One process; once it does not answer, it never does."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        with suppress(OSError):
            self.process = subprocess.Popen(
                [sys.executable, "-c", CODE, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt from the keyboard is not for it
            )
            self._send(json.dumps(document).encode() + b"\n")

    def ask(self, batch: Batch) -> Chunk | None:
        """The chunk of a batch; None where there is no answer, whose reason is found by encoding it here."""
        if self.process is None or self.process.stdout is None:
            return None
        with suppress(OSError, ValueError):
            self._send(message(batch))
            size = int.from_bytes(self.process.stdout.read(LENGTH), "little")
            answer = self.process.stdout.read(size)
            if size and len(answer) == size:
                return chunk_of(answer)
        self.end()
        return None

    def end(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _send(self, data: bytes) -> None:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()
