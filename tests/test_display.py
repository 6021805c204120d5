"""What a run shows while it goes on: some lines, or a bar, and in a long step how far it is."""

import io
import time
from collections.abc import Callable

import pytest

from peftctl import display
from peftctl.report import Doing
from peftctl.waiting import Pace


def events(upto: int, every: int = 2) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for step in range(1, upto + 1):
        found.append({"event": "step", "step": step, "loss": 1 / step})
        if step % every == 0:
            found.append({"event": "evaluation", "step": step, "validation_loss": 2 / step})
    return found


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_piped_display_shows_some_lines_all_evaluations_and_notices() -> None:
    stream = io.StringIO()
    with display.display(100, stream=stream) as shown:
        for event in events(100, every=50):
            shown(event)
        shown.notice("saved")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 1/100  loss 1") and lines[-1] == "saved"
    assert sum(line.startswith("evaluation") for line in lines) == 2
    assert 10 < len(lines) < 30 and "\x1b" not in stream.getvalue()


def test_quiet_display_is_silent() -> None:
    stream = io.StringIO()
    with display.display(3, quiet=True, stream=stream) as shown:
        for event in events(3):
            shown(event)
        shown.notice("saved")
    assert stream.getvalue() == ""


def test_terminal_display_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with display.display(3, stream=stream) as shown:
        for event in events(3):
            shown(event)
        shown.notice("[not markup]")
    text = stream.getvalue()
    assert "3/3" in text and "evaluation 2/3" in text and "[not markup]" in text and "\x1b" in text


KINDS: list[type[display.Silent]] = [display.Lines, display.Bar]


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_step_tells_how_far_it_is(kind: type[display.Silent]) -> None:
    clock = Clock()
    shown = kind(9, Terminal(), clock)
    shown.progress(Doing("step", 3))
    clock.now += 4
    shown.progress(Doing("step", 3, 1, 4, 100))
    assert shown.long_work() is None, "it has not taken long yet"
    clock.now += 4
    assert shown.long_work() == "step 3/9  1 of 4 micro-batches  tokens_per_s 12.5  0:08"
    clock.now += 3600
    assert str(shown.long_work()).endswith("  1:00:08"), "time goes on within a micro-batch"
    shown({"event": "step", "step": 3, "loss": 1.0})
    assert shown.long_work() is None


@pytest.mark.parametrize("kind", KINDS)
def test_so_does_a_long_evaluation_and_what_comes_before_the_first_step(kind: type[display.Silent]) -> None:
    clock = Clock()
    shown = kind(9, Terminal(), clock)
    shown.working("loading the base x")
    clock.now += 6
    assert shown.long_work() == "loading the base x  0:06"
    shown.progress(Doing("evaluation", 4))
    assert shown.long_work() is None
    clock.now += 10
    shown.progress(Doing("evaluation", 4, 12, None, 600))
    assert shown.long_work() == "evaluation 4/9  12 micro-batches  tokens_per_s 60  0:10"
    shown({"event": "evaluation", "step": 4, "validation_loss": 1.0})
    assert shown.long_work() is None


def told(seconds: float, step: float) -> list[str]:
    """The lines of a run whose steps take so many seconds, looked at every second."""
    clock, stream = Clock(), io.StringIO()
    shown = display.Lines(1000, stream, clock)
    for number in range(1, int(seconds / step)):
        shown.progress(Doing("step", number))
        for _ in range(int(step)):
            clock.now += 1
            shown.remind()
        shown({"event": "step", "step": number, "loss": 1.0})
    return [line for line in stream.getvalue().splitlines() if "loss" not in line]


def test_short_steps_are_told_of_as_before() -> None:
    assert told(2000, 4) == []


def test_lines_of_long_steps_become_rarer() -> None:
    minute, hour = told(130, 60), told(3700, 600)
    assert 4 <= len(minute) <= 12 and minute[0] == "step 1/1000  0:10"
    assert 60 <= len(hour) <= 200, "a log is not to be flooded"


def test_other_lines_count_as_signs_of_life() -> None:
    clock = Clock()
    pace = Pace(clock)
    clock.now += 9
    pace.reset()
    clock.now += 9
    assert not pace.due()
    clock.now += 1
    assert pace.due()


def until(true: Callable[[], bool]) -> bool:
    for _ in range(5000):  # a machine may be busy
        if true():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_the_display_moves_while_the_loop_says_nothing(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    clock = Clock()
    kind = display.Bar if stream.isatty() else display.Lines
    with kind(3, stream, clock) as shown:
        shown.progress(Doing("step", 1, 0, 7))
        clock.now += 77
        assert until(lambda: "0 of 7 micro-batches  1:17" in stream.getvalue())


def test_a_stream_that_is_gone_ends_the_reminders_alone() -> None:
    clock, stream = Clock(), io.StringIO()
    with display.Lines(3, stream, clock) as shown:
        shown.progress(Doing("step", 1))
        stream.close()
        clock.now += 77
        assert until(lambda: not shown._thread.is_alive())


def test_nothing_is_shown_of_progress_when_quiet() -> None:
    clock, stream = Clock(), io.StringIO()
    with display.Silent(3, stream, clock) as shown:
        shown.working("loading")
        shown.progress(Doing("step", 1, 1, 2, 3))
        clock.now += 77
    assert stream.getvalue() == ""
