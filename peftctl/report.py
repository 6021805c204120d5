"""Where events go: metrics.jsonl. And what else a run tells while it goes on.

An event is a flat dict of JSON values with the key `event`; sinks are callables that take one.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from peftctl.errors import SaveError

Event = Mapping[str, Any]
Sink = Callable[[Event], None]


class Doing(NamedTuple):
    """How far a step is that has begun, or an evaluation. It is shown and not logged: it is no event."""

    what: str  # step or evaluation
    step: int  # of an evaluation, the one before it
    done: int = 0  # micro-batches
    total: int | None = None  # micro-batches, if that is known
    tokens: int = 0  # real tokens in those that are done


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
