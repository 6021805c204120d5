"""Starting the processes of a run on this machine, and ending them together. Torch-free."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO

from peftctl.threads import usable

GRACE = 20.0  # seconds that the others have to end by themselves, once one has ended otherwise than well
Process = subprocess.Popen[bytes]


def launch(count: int, words: Sequence[str]) -> int:
    """Run `peftctl WORDS` in `count` processes; the exit code of the first that did not end well, 0 if all did.

    The first process speaks for all. Signals are passed on.
    """
    words = _without_count(words)
    with tempfile.TemporaryFile() as said:
        port = free_port()
        processes = [_started(rank, count, port, words, said) for rank in range(count)]
        with _passed_on(processes):
            rank = _first_failure(processes)
            _end(processes)
        codes = [_code(process) for process in processes]
        if rank is not None and (codes[rank] != codes[0] or processes[rank].returncode < 0):
            last = _last(said) if rank else ""  # the leader has told by itself
            print(f"peftctl: error: process {rank} of {count} ended with {codes[rank]}{last}", file=sys.stderr)
    return next((code for code in codes if code), 0)


def _without_count(words: Sequence[str]) -> list[str]:
    """The words of the command line but `--nproc N`."""
    return [
        word
        for before, word in zip(("", *words), words, strict=False)
        if before != "--nproc" and word.partition("=")[0] != "--nproc"
    ]


def _started(rank: int, count: int, port: int, words: Sequence[str], said: IO[bytes]) -> Process:
    threads = str(max(1, len(usable()) // count))
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} | os.environ
    environment |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    leads = rank == 0
    # a session of their own: a terminal's Ctrl-C reaches them once, through us
    return subprocess.Popen(
        [sys.executable, "-m", "peftctl.cli", *words],
        env=environment,
        start_new_session=True,
        stdout=None if leads else subprocess.DEVNULL,
        stderr=None if leads else said,
    )


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextmanager
def _passed_on(processes: Sequence[Process]) -> Iterator[None]:
    def handler(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _first_failure(processes: Sequence[Process]) -> int | None:
    """The rank of the first process to end otherwise than well; None when all ended well."""
    while any(process.poll() is None for process in processes):
        for rank, process in enumerate(processes):
            if process.returncode:
                return rank
        time.sleep(0.05)
    return next((rank for rank, process in enumerate(processes) if process.returncode), None)


def _end(processes: Sequence[Process]) -> None:
    """See every process end: by itself, asked, and at last killed."""
    asked = time.monotonic() + GRACE
    while any(process.poll() is None for process in processes):
        late = time.monotonic() - asked
        for process in processes:
            if late > 0 and process.poll() is None:
                process.send_signal(signal.SIGKILL if late > GRACE else signal.SIGTERM)
        time.sleep(0.05 if late <= 0 else 1.0)


def _code(process: Process) -> int:
    code = process.returncode
    return 128 - code if code < 0 else code


def _last(said: IO[bytes]) -> str:
    said.seek(0)
    lines = [line for line in said.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return f": {lines[-1].removeprefix('peftctl: error: ')}" if lines else ""
