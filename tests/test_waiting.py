"""Before the first result, and beside the steps of a run, something says what takes so long."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peftctl import waiting

ROOT = Path(__file__).parent.parent
SMOKE = str(ROOT / "recipes" / "smoke.yaml")
LOADING = "peftctl: loading PyTorch and transformers"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_done_is_a_line_in_a_pipe() -> None:
    stream = io.StringIO()
    with waiting.doing("loading x", stream=stream):
        assert stream.getvalue() == "peftctl: loading x\n"
    assert stream.getvalue() == "peftctl: loading x\n"


def test_on_a_terminal_it_goes_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), waiting.doing("loading x", stream=stream):
        assert stream.getvalue() == "peftctl: loading x ..."
        raise KeyboardInterrupt
    assert stream.getvalue().endswith("\r\x1b[2K")


def test_one_process_speaks_and_none_when_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with waiting.doing("loading x", quiet=True, stream=stream):
        pass
    monkeypatch.setenv("RANK", "1")
    with waiting.doing("loading x", stream=stream):
        pass
    assert stream.getvalue() == ""
    monkeypatch.setenv("RANK", "0")
    with waiting.doing("loading x", stream=stream):
        pass
    assert stream.getvalue() != ""


def test_a_base_is_told_as_it_would_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = [waiting.loading(name) for name in (str(tmp_path / "a" / "b"), "/elsewhere", "owner/name")]
    assert named == [f"loading the base {name}" for name in (os.path.join("a", "b"), "/elsewhere", "owner/name")]


def test_a_count_is_told_now_and_then_and_in_the_end() -> None:
    now = [0.0]
    stream = io.StringIO()
    tell = waiting._Counted("examples evaluated:", stream, waiting.Pace(lambda: now[0]))
    for done in range(1, 31):
        now[0] += 1
        tell(done, 30)
    lines = stream.getvalue().splitlines()
    assert lines == [f"examples evaluated: {text}" for text in ("10 of 30", "20 of 30", "30")]


IMPORTED = """
import sys
from peftctl import cli
class Found(Exception): pass
class Finder:
    def find_spec(self, name, *rest):
        if name == "torch": raise Found
sys.meta_path.insert(0, Finder())
try:
    cli.main(sys.argv[1:])
except Found:
    sys.exit(77)
"""
COMMANDS = {
    "train": ["train", SMOKE, "--output", "run"],
    "eval": ["eval", "model", "--data", str(ROOT / "configs" / "data" / "messages.jsonl")],
    "generate": ["generate", "model", "--prompt", "x"],
    "merge": ["merge", "adapter", "--output", "merged"],
    "export": ["export", "adapter", "--to", "peft", "--output", "out"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("quiet", [False, True])
def test_something_is_said_before_torch_is_imported(command: str, quiet: bool, tmp_path: Path) -> None:
    """The process is ended where it would import torch."""
    words = [*COMMANDS[command], *(["--quiet"] if quiet else [])]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 77, done.stderr
    assert done.stderr.splitlines() == ([] if quiet else [LOADING]) and done.stdout == ""


def test_a_mistake_in_the_recipe_is_told_alone(tmp_path: Path) -> None:
    words = ["train", SMOKE, "--set", "train.max_steps=x"]
    done = subprocess.run(
        [sys.executable, "-m", "peftctl.cli", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and LOADING not in done.stderr
