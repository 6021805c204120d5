"""Where events go: metrics.jsonl, and a display on stderr that is alive on a terminal and plain lines elsewhere.

An event is a flat dict of JSON values with the key `event`; sinks are callables that take one.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from peftctl.errors import SaveError

Event = Mapping[str, Any]
Sink = Callable[[Event], None]

_QUALITY = ("reward", "token_accuracy", "accuracy", "margin", "f1_macro", "matthews", "pearson")
_SHOWN = ("loss", "skipped", "validation_loss", *_QUALITY, *(f"validation_{n}" for n in _QUALITY), "lr", "tokens_per_s")


def tee(*sinks: Sink) -> Sink:
    """One sink that feeds several, in order."""

    def emit(event: Event) -> None:
        for sink in sinks:
            sink(event)

    return emit


class Log:
    """metrics.jsonl: one event a line, on its way to the disk as soon as it happened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _opened(path)

    def __call__(self, event: Event) -> None:
        try:
            line = (encode(event) + "\n").encode()
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise SaveError(f"cannot write {self.path}: {error.strerror}") from error

    def sync(self) -> None:
        """Wait until all of it is on the disk; before a checkpoint, for the log must not lag behind one."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise SaveError(f"cannot write {self.path}: {error.strerror}") from error

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._file.close()


def encode(event: Event) -> str:
    """One line of JSON. JSON has no NaN: it becomes a string, for what was seen is not to be lost."""
    return json.dumps({key: _plain(value) for key, value in event.items()}, allow_nan=False)


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a log; nothing when there is no file. It ends where a crash damaged it."""
    return [event for _, event in _whole(path)]


def truncate(path: Path, step: int) -> None:
    """Cut a log back to a checkpoint's step, in place, so that in the end it equals an uninterrupted run's.

    The step's own evaluation goes too: a checkpoint comes before it, and the loop repeats it on resume. At 0 nothing
    stays.
    """
    size = 0
    for line, event in _whole(path) if step else ():
        if event.get("step", 0) > step or (event.get("step") == step and event["event"] != "step"):
            break
        size += len(line) + 1
    try:
        if path.exists():
            os.truncate(path, size)
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error.strerror}") from error


class Latest:
    """Remembers the last event of each kind, for the summary of a run."""

    def __init__(self) -> None:
        self.events: dict[str, Event] = {}

    def __call__(self, event: Event) -> None:
        self.events[event["event"]] = event


class Lines:
    """Progress as plain lines: the first and the last step, some twenty between, every evaluation and skipped step."""

    def __init__(self, steps: int, stream: TextIO) -> None:
        self.steps = steps
        self.stream = stream

    def __call__(self, event: Event) -> None:
        every = max(1, self.steps // 20)
        told = event["event"] != "step" or "skipped" in event
        if told or event["step"] in (1, self.steps) or event["step"] % every == 0:
            self.notice(describe(event, self.steps))

    def notice(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        pass


class Bar:
    """Progress as a bar with the latest figures; evaluations and skipped steps stay above it."""

    def __init__(self, steps: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"))
        self.steps = steps
        self._progress = Progress(*columns, TimeRemainingColumn(), console=Console(file=stream))
        self._task = self._progress.add_task("", total=steps)

    def __call__(self, event: Event) -> None:
        if event["event"] == "step":
            self._progress.update(self._task, completed=event["step"], description=figures(event))
        if event["event"] != "step" or "skipped" in event:
            self.notice(describe(event, self.steps))

    def notice(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class Silent(Lines):
    """No progress at all."""

    def notice(self, text: str) -> None:
        pass


def display(steps: int, quiet: bool = False, stream: TextIO | None = None) -> Lines | Bar:
    """What shows progress on a stream, stderr by default: used in a `with`, called with events, `notice`d texts."""
    stream = stream or sys.stderr
    if quiet:
        return Silent(steps, stream)
    return Bar(steps, stream) if stream.isatty() else Lines(steps, stream)


def describe(event: Event, steps: int) -> str:
    """An event as a line to read."""
    if "step" not in event:
        return f"{event['event']}  {figures(event)}".rstrip()
    return f"{event['event']} {event['step']}/{steps}  {figures(event)}"


def figures(event: Event) -> str:
    """The figures worth a glance."""
    return "  ".join(f"{name} {_short(event[name])}" for name in _SHOWN if name in event)


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if value and abs(value) < 0.01:
        return f"{value:.2e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _plain(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _opened(path: Path) -> FileIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab", buffering=0)  # unbuffered: a full disk shows at the line that does not fit
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error.strerror}") from error


def _whole(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines and their events, up to the first that is no event or has no line break."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            return
        if not isinstance(event, dict) or "event" not in event:
            return
        yield line, event
