"""What a run shows on stderr: alive on a terminal, plain lines elsewhere. It is told events, notices and progress."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from peftctl.report import Doing, Event
from peftctl.waiting import Pace

if TYPE_CHECKING:
    from rich.progress import Task
    from rich.text import Text

LONG = 5.0  # seconds that a step or an evaluation may take before its progress is shown

_QUALITY = ("reward", "token_accuracy", "accuracy", "margin", "f1_macro", "matthews", "pearson")
_SHOWN = ("loss", "skipped", "validation_loss", *_QUALITY, *(f"validation_{n}" for n in _QUALITY), "lr", "tokens_per_s")


class _Work(NamedTuple):
    """What goes on, since when, and how far it is if that is known."""

    name: str
    begun: float
    doing: Doing | None = None

    def told(self, seconds: float) -> str:
        amount = () if self.doing is None else _amount(self.doing, seconds)
        return "  ".join((self.name, *amount, _duration(seconds)))


class Silent:
    """No progress at all; what the other displays have in common."""

    def __init__(self, steps: int, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.steps = steps
        self.stream = stream
        self.clock = clock
        self._work: _Work | None = None

    def __call__(self, event: Event) -> None:
        """A step or an evaluation is over, or something else has happened."""
        self._work = None
        if event["event"] == "step":
            self.show_step(event)
        if event["event"] != "step" or "skipped" in event:
            self.notice(describe(event, self.steps))

    def working(self, name: str) -> None:
        """Something begins that takes a while."""
        self._work = _Work(name, self.clock())

    def progress(self, doing: Doing) -> None:
        """How far a step or an evaluation is."""
        name = f"{doing.what} {doing.step}/{self.steps}"
        before = self._work
        begun = before.begun if before is not None and before.name == name else self.clock()
        self._work = _Work(name, begun, doing)

    def show_step(self, event: Event) -> None:
        """A step is over."""

    def notice(self, text: str) -> None:
        """A line that stays."""

    def long_work(self) -> str | None:
        """What goes on and how far it is; of a step or an evaluation, once it has taken long."""
        work = self._work  # one look: the thread that computes may put another in its place
        if work is None:
            return None
        seconds = self.clock() - work.begun
        return work.told(seconds) if work.doing is None or seconds >= LONG else None

    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Lines(Silent):
    """Progress as plain lines: the first and the last step, some twenty between, every evaluation and skipped step.

    What takes long is told of now and then, by a thread, for a single product may take long too.
    """

    def __init__(self, steps: int, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(steps, stream, clock)
        self._pace = Pace(clock)
        self._writing = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="display", daemon=True)

    def show_step(self, event: Event) -> None:
        every = max(1, self.steps // 20)
        due = event["step"] in (1, self.steps) or event["step"] % every == 0
        if due and "skipped" not in event:
            self.notice(describe(event, self.steps))

    def working(self, name: str) -> None:
        super().working(name)
        self.notice(name)

    def notice(self, text: str) -> None:
        with self._writing:
            self._pace.reset()
            print(text, file=self.stream, flush=True)

    def remind(self) -> None:
        """A line about what goes on, if it has taken long and nothing was told for long."""
        text = self.long_work()
        if text is not None and self._pace.due():
            self.notice(text)

    def _tick(self) -> None:
        with suppress(OSError, ValueError):  # a stream that is closed: whoever computes will hear of it
            while not self._over.wait(1.0):
                self.remind()

    def __enter__(self) -> Lines:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()


class Bar(Silent):
    """Progress as a bar with the latest figures or, in a long step, its own; evaluations stay above it."""

    def __init__(self, steps: int, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TimeRemainingColumn
        from rich.text import Text

        class Now(ProgressColumn):
            """Made anew whenever the bar is drawn, by a thread of its own."""

            def render(column, task: Task) -> Text:
                return Text(self.long_work() or self._latest)

        super().__init__(steps, stream, clock)
        self._latest = ""
        columns = (MofNCompleteColumn(), BarColumn(bar_width=24), Now(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(file=stream), refresh_per_second=4)
        self._task = self._progress.add_task("", total=steps)

    def show_step(self, event: Event) -> None:
        self._latest = figures(event)
        self._progress.update(self._task, completed=event["step"])

    def notice(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


def display(steps: int, quiet: bool = False, stream: TextIO | None = None) -> Silent:
    """What shows progress on a stream, stderr by default: used in a `with`, called with events, `notice`d texts."""
    stream = stream or sys.stderr
    kind = Silent if quiet else Bar if stream.isatty() else Lines
    return kind(steps, stream)


def describe(event: Event, steps: int) -> str:
    """An event as a line to read."""
    if "step" not in event:
        return f"{event['event']}  {figures(event)}".rstrip()
    return f"{event['event']} {event['step']}/{steps}  {figures(event)}"


def figures(event: Event) -> str:
    """The figures worth a glance."""
    return "  ".join(f"{name} {_short(event[name])}" for name in _SHOWN if name in event)


def _amount(doing: Doing, seconds: float) -> tuple[str, ...]:
    """How far a step or an evaluation is that has taken so many seconds."""
    if doing.total is None and not doing.done:
        return ()
    of = "" if doing.total is None else f" of {doing.total:,}"
    rate = (f"tokens_per_s {_short(doing.tokens / seconds)}",) if doing.tokens else ()
    return (f"{doing.done:,}{of} micro-batches", *rate)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if value and abs(value) < 0.01:
        return f"{value:.2e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
