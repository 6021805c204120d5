"""Progress of what comes before the first step: shown on stderr once it has taken a second, and not before."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

AFTER, EVERY = 1.0, 10.0  # seconds until anything is shown, and between the plain lines of a long work

Shown = Callable[[str, int, int | None], None]  # a source's name, rows done, rows in all if that can be guessed


@contextmanager
def tokenising(quiet: bool = False, stream: TextIO | None = None) -> Iterator[Shown]:
    """What shows the rows of a source as they are tokenised: a bar on a terminal, some lines elsewhere."""
    stream = stream or sys.stderr
    if quiet:
        yield lambda name, done, total: None
    elif stream.isatty():
        with _bar(stream) as progress:
            yield _Bars(progress)
    else:
        lines = _Lines(stream)
        yield lines
        lines.end()


@contextmanager
def _bar(stream: TextIO) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.completed:,} rows"))
    progress = Progress(*columns, TimeRemainingColumn(), console=Console(file=stream), transient=True)
    try:
        yield progress
    finally:
        progress.stop()


class _Bars:
    """One bar for each source."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.begun = time.perf_counter()
        self.name = ""

    def __call__(self, name: str, done: int, total: int | None) -> None:
        if time.perf_counter() - self.begun < AFTER:
            return
        if name != self.name:
            self.name, self.task = name, self.progress.add_task(f"tokenising {name}", total=total)
            self.progress.start()
        self.progress.update(self.task, completed=done, total=total)


class _Lines:
    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.begun = time.perf_counter()
        self.next = self.begun + AFTER
        self.name, self.done = "", 0

    def __call__(self, name: str, done: int, total: int | None) -> None:
        self.name, self.done = name, done
        if time.perf_counter() < self.next:
            return
        of = f" of about {total:,}" if total is not None and total > done else ""
        print(f"tokenising {name}: {done:,}{of} rows", file=self.stream, flush=True)
        self.next = time.perf_counter() + EVERY

    def end(self) -> None:
        seconds = time.perf_counter() - self.begun
        if self.next > self.begun + AFTER:
            print(f"tokenised {self.name}: {self.done:,} rows in {seconds:.0f} s", file=self.stream, flush=True)
