"""Readers of strangers' files: a few inputs of each kind, and what was once a traceback, a hang or a gigabyte."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftctl.data import sandbox
from tests.faults import fuzz, targets
from tests.faults.conftest import Seen
from tests.faults.targets import TARGETS, Failure, Target, judge

CASES = sorted((Path(__file__).parent / "cases").iterdir())  # named TARGET-WHAT


@pytest.fixture(autouse=True)
def aside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hypothesis seeds Python's own generator; and a template that never ends need not be waited for."""
    state = random.getstate()
    monkeypatch.setattr(sandbox, "WORK", 50_000)
    yield
    random.setstate(state)


@pytest.mark.fault(22, 29, 30, 31, 34, 36)
@pytest.mark.parametrize("name", TARGETS)
def test_a_few_strange_inputs_are_read_or_refused(name: str) -> None:
    _, failure, data = fuzz.examine(name, 0, 20)
    assert failure is None, data


@pytest.mark.fault(22, 34, 36)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_was_found_once_is_refused(case: Path, seen: Seen) -> None:
    said = judge(case.name.partition("-")[0], case.read_bytes())
    assert said != "read" and "\n" not in said
    seen(said)


def target(monkeypatch: pytest.MonkeyPatch, name: str, read: object) -> None:
    monkeypatch.setitem(targets.TARGETS, name, Target(TARGETS[name].inputs, read))  # type: ignore[arg-type]


def test_the_fuzzer_sees_a_traceback_and_makes_it_small(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(data: bytes, folder: Path) -> None:
        if b"{%" in data:
            raise KeyError("found")

    target(monkeypatch, "template", read)
    _, failure, data = fuzz.examine("template", 0, 200)
    assert "KeyError" in str(failure) and b"{%" in data and len(data) < 60


def test_the_fuzzer_sees_a_hang_and_a_gigabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(data: bytes, folder: Path) -> None:
        while True:
            pass

    monkeypatch.setattr(targets, "SECONDS", 0.1)
    target(monkeypatch, "index", hang)
    with pytest.raises(Failure, match=r"not done after 0\.1 s"):
        judge("index", b"")
    target(monkeypatch, "index", lambda data, folder: bytes(2 * targets.BYTES))
    with pytest.raises(Failure, match="MemoryError"):
        judge("index", b"")
