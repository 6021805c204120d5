"""Signs of life on stderr from whatever takes long beside the steps of a run. Torch-free."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from peftctl.imports import importing

if TYPE_CHECKING:
    from rich.progress import Progress

AFTER, EVERY = 1.0, 10.0  # seconds until anything is shown, and between the plain lines of a long work

FIRST, MOST, SHARE = 10.0, 60.0, 0.05  # of `Pace`: seconds, and a share of the time so far

Shown = Callable[[str, int, int | None], None]  # a source's name, rows done, rows in all if that can be guessed


class Pace:
    """When a line about a long work is due: after 10 silent seconds, later a twentieth of its time, at most 60."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.begun = self.last = clock()

    def due(self) -> bool:
        now = self.clock()
        return now - self.last >= min(MOST, max(FIRST, SHARE * (now - self.begun)))

    def reset(self) -> None:
        """A line was written, of whatever kind."""
        self.last = self.clock()


@contextmanager
def doing(text: str, quiet: bool = False, stream: TextIO | None = None) -> Iterator[None]:
    """Tell what is being done: on a terminal until it is done, elsewhere in a line. Of several processes one speaks."""
    stream = stream or sys.stderr
    if quiet or os.environ.get("RANK", "0") != "0":
        yield
    elif not stream.isatty() or os.environ.get("TERM") == "dumb":
        print(f"peftctl: {text}", file=stream, flush=True)
        yield
    else:
        print(f"peftctl: {text} ...", end="", file=stream, flush=True)
        try:
            yield
        finally:
            print("\r\x1b[2K", end="", file=stream, flush=True)


def loading(name: str) -> str:
    """That a base is being loaded; of one below the current folder, the way from there."""
    here = f"{os.getcwd()}{os.sep}"
    return f"loading the base {name.removeprefix(here)}"


@contextmanager
def libraries(quiet: bool = False) -> Iterator[None]:
    """For the length of the import of torch and transformers, tell of it, unless they are there already."""
    if "torch" in sys.modules:
        yield
        return
    with doing("loading PyTorch and transformers", quiet), importing():
        yield


@contextmanager
def counting(title: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """What is told how much of something is done: a bar on a terminal, some lines elsewhere."""
    if quiet:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress, TimeElapsedColumn

        with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=Console(stderr=True)) as progress:
            task = progress.add_task(title, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
    else:
        yield _Counted(title, sys.stderr, Pace())


class _Counted:
    """Lines that say how much is done: now and then, and in the end."""

    def __init__(self, title: str, stream: TextIO, pace: Pace) -> None:
        self.title = title
        self.stream = stream
        self.pace = pace

    def __call__(self, done: int, total: int) -> None:
        if done < total and not self.pace.due():
            return
        self.pace.reset()
        of = f"{done:,} of " if done < total else ""
        print(f"{self.title} {of}{total:,}", file=self.stream, flush=True)


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
