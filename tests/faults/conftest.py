"""What the tests of faults share: a trained run, a command, and a place to say what was seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from peftctl import cli
from tests import runs

Seen = Callable[[object], None]


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Seen:
    """Tells the table what happened: an error, or a text."""

    def tell(what: object) -> None:
        value = getattr(what, "value", what)
        text = f"{type(value).__name__}: {value}" if isinstance(value, Exception) else str(value)
        assert "\n" not in text, "an error is one line"
        # where this machine keeps its files is of no interest
        text = text.replace(f"{request.getfixturevalue('tmp_path')}/", "")
        request.node.user_properties.append(("seen", text if len(text) < 150 else f"{text[:147]}..."))

    return tell


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 4 steps with all its checkpoints; not to be written to."""
    output = tmp_path_factory.mktemp("faults") / "run"
    runs.train(output, runs.document(train={"save_every": 1, "keep": 9}))
    return output


class Answer(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """A command, as `main` runs it."""

    def run(*arguments: Any) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main([str(word) for word in arguments])
        captured = capsys.readouterr()
        return Answer(end.value.code if isinstance(end.value.code, int) else 0, captured.out, captured.err)

    return run
