"""Events arrive in the log as they are, and a log is cut back to where a checkpoint stands."""

import json
import math
import resource
from pathlib import Path

import pytest

from peftctl import report
from peftctl.errors import SaveError


def events(upto: int, every: int = 2) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for step in range(1, upto + 1):
        found.append({"event": "step", "step": step, "loss": 1 / step})
        if step % every == 0:
            found.append({"event": "evaluation", "step": step, "validation_loss": 2 / step})
    return found


def write(path: Path, items: list[dict[str, object]]) -> None:
    with report.Log(path) as log:
        for event in items:
            log(event)


def test_log_keeps_floats_exactly_and_appends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    items = [{"event": "step", "step": 1, "loss": 0.1 + 0.2}, {"event": "step", "step": 2, "loss": 1e-300}]
    write(path, items[:1])
    write(path, items[1:])
    assert report.read(path) == items


def test_each_event_is_on_its_way_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with report.Log(path) as log:
        log({"event": "step", "step": 1})
        assert report.read(path) == [{"event": "step", "step": 1}]
        log.sync()


@pytest.mark.fault(42)
def test_what_is_not_finite_is_not_lost_and_the_file_stays_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [{"event": "step", "a": math.nan, "b": math.inf, "c": -math.inf}])

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "event": "step",
        "a": "NaN",
        "b": "Infinity",
        "c": "-Infinity",
    }


@pytest.mark.parametrize("step", [1, 2, 3, 4])
@pytest.mark.parametrize("tail", [b"", b'{"event": "st', b"\0\0\0\n", b"17\n"])
def test_truncated_and_continued_log_equals_the_uninterrupted_one(tmp_path: Path, step: int, tail: bytes) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    write(whole, events(5))
    write(cut, events(4))
    with cut.open("ab") as file:
        file.write(tail)
    at = events(5).index({"event": "step", "step": step, "loss": 1 / step})
    with report.Log(cut) as log:
        report.truncate(cut, step)  # the step's evaluation goes, and is repeated on resume; the open log stays good
        for event in events(5)[at + 1 :]:
            log(event)
    assert cut.read_bytes() == whole.read_bytes()


def test_log_is_empty_at_step_0_and_need_not_be_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    report.truncate(path, 3)
    assert report.read(path) == [] and not path.exists()
    write(path, events(3))
    report.truncate(path, 9)
    assert report.read(path) == events(3)
    report.truncate(path, 0)
    assert path.read_bytes() == b""


def test_log_that_cannot_be_opened_or_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"cannot write .*file/metrics\.jsonl"):
        report.Log(tmp_path / "file" / "metrics.jsonl")
    path = tmp_path / "metrics.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with report.Log(path) as log:
        log({"event": "step", "step": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))  # stands for a disk that is full there
        try:
            with pytest.raises(SaveError, match=r"cannot write .*metrics\.jsonl: No space left"):
                log({"event": "step", "step": 2})
            with pytest.raises(SaveError, match=r"metrics\.jsonl: File too large"):
                log({"event": "step", "step": 3})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert report.read(path) == [{"event": "step", "step": 1}]


def test_tee_feeds_all() -> None:
    one: list[report.Event] = []
    two: list[report.Event] = []
    emit = report.tee(one.append, two.append)
    for event in events(4):
        emit(event)
    assert one == two == events(4)
