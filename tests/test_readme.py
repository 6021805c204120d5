"""The README is true: its commands run, its recipes load, its tables are what is printed, its toy method trains."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from peftctl import cli, methods, recipe
from tests.methods import contract

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8")


class Fenced(NamedTuple):
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that a block is, by its first line: `# recipes/gain.yaml`."""
        named = re.match(r"# (\S+\.(?:yaml|yml|py))\n", self.text)
        return named.group(1) if named else None


BLOCKS = [Fenced(*found) for found in re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.M | re.S)]
FILES = {block.file: block.text for block in BLOCKS if block.file is not None}
WORKFLOW = ".github/workflows/adapter.yml"
TOY = "peftctl/methods/gain"


def commands() -> list[str]:
    lines = [line.removeprefix("$ ") for b in BLOCKS if b.language in ("sh", "console") for line in b.text.splitlines()]
    return [line for line in lines if line.startswith("peftctl ")]


def on_the_real_model(command: str) -> bool:
    return "smollm2" in command and "--smoke" not in command


def printed_after(sentence: str) -> str:
    """The block that follows a sentence of the page."""
    found = re.search(re.escape(sentence) + r"\s+```text\n(.*?)^```$", TEXT, re.M | re.S)
    assert found, sentence
    return found.group(1)


def run(command: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(shlex.split(command)[1:])
    return int(left.value.code or 0)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a checkout's, with the page's own recipes in it."""
    for name in ("configs", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for file, text in FILES.items():
        if file.endswith(".yaml"):
            (tmp_path / file).write_text(text, "utf-8")
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    return tmp_path


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The toy method of the page, found beside the package's own."""
    folder = tmp_path / "more" / Path(TOY).name
    folder.mkdir(parents=True)
    for name in ("__init__.py", "delta.py"):
        (folder / name).write_text(FILES[f"{TOY}/{name}"], "utf-8")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder.parent)])
    yield
    for module in [name for name in sys.modules if name.startswith("peftctl.methods.gain")]:
        del sys.modules[module]
    vars(methods).pop("gain", None)


def test_the_page_has_what_the_tests_look_for() -> None:
    assert {"recipes/smoke.yaml", "bad.yaml", WORKFLOW, f"{TOY}/__init__.py", "tests/methods/test_gain.py"} <= set(
        FILES
    )
    assert len([c for c in commands() if not on_the_real_model(c)]) > 8


def test_commands_run(page: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command in commands():
        if not on_the_real_model(command):
            code = run(command)
            assert code == 0, f"{command}: exit code {code}\n{capfd.readouterr().err}"


@pytest.mark.slow
def test_commands_on_the_real_model_run(page: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (page / ".cache").symlink_to(ROOT / ".cache", target_is_directory=True)
    for command in filter(on_the_real_model, commands()):
        # two steps are enough to see that a recipe runs; the demo trains one in full
        short = " --set train.max_steps=2" if command.startswith("peftctl train") else ""
        code = run(command + short)
        assert code == 0, f"{command}: exit code {code}; `make demo-data` fetches the base\n{capfd.readouterr().err}"


def test_every_command_is_in_the_table() -> None:
    names = {str(c.name or getattr(c.callback, "__name__", "")).replace("_", "-") for c in cli.app.registered_commands}
    table = TEXT[TEXT.index("## Commands") : TEXT.index("Every command has `--help`")]
    assert set(re.findall(r"`peftctl ([a-z-]+)", table)) == names


@pytest.mark.parametrize("name", ["methods", "objectives"])
def test_tables_are_what_is_printed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"peftctl {name}") == 0
    assert capsys.readouterr().out == printed_after(f"`peftctl {name}` prints:")


def test_recipes_load(page: Path, toy: None) -> None:
    for file in FILES:
        if file.endswith(".yaml") and file != "bad.yaml":
            assert recipe.load(Path(file)).output.startswith("runs/")


def test_the_smoke_recipe_is_the_one_that_ships() -> None:
    def plain(text: str) -> object:
        return yaml.safe_load(text)

    assert plain(FILES["recipes/smoke.yaml"]) == plain((ROOT / "recipes" / "smoke.yaml").read_text("utf-8"))


def test_what_came_out_comes_out(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lines and the losses of the page; not the speeds, nor the last digits."""
    assert run("peftctl train recipes/smoke.yaml") == 0
    out, err = capsys.readouterr()
    before, *lines = printed_after("Progress, on stderr:").splitlines()
    assert before == "peftctl: loading PyTorch and transformers"  # which are there already in a test
    assert figures(err) == figures("\n".join(lines))
    shown = printed_after("The result, on stdout (one JSON document with `--json`):")
    assert [line.split()[0] for line in out.splitlines()] == [line.split()[0] for line in shown.splitlines()]


def figures(text: str) -> list[tuple[str, ...]]:
    """Each line's words, numbers to two decimals, without the speed."""
    lines = [re.sub(r"  tokens_per_s \S+", "", line).split() for line in text.splitlines()]
    return [tuple(re.sub(r"^(\d+\.\d{2})\d*$", r"\1", word) for word in line) for line in lines]


def test_the_error_shown_is_the_error(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("peftctl train bad.yaml") == 2
    assert capsys.readouterr().err == printed_after("gives exit code 2 and")


def test_the_workflow_is_yaml_whose_commands_run(page: Path, capfd: pytest.CaptureFixture[str]) -> None:
    steps = yaml.safe_load(FILES[WORKFLOW])["jobs"]["smoke"]["steps"]
    lines = [step["run"] for step in steps if step.get("run", "").startswith("peftctl ")]
    assert lines and run("peftctl init my.yaml") == 0
    for line in lines:
        assert run(line) == 0, capfd.readouterr().err


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of peft and transformers, in between
def test_the_adapter_loads_in_python(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("peftctl train recipes/smoke.yaml") == 0
    capsys.readouterr()
    exec(compile(FILES["load.py"], "load.py", "exec"), {})
    assert "What does an adapter add to a model?" in capsys.readouterr().out


def test_the_toy_method_trains(page: Path, toy: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert "gain" in methods.names()
    assert run("peftctl train recipes/gain.yaml --json") == 0
    assert (page / "runs" / "gain" / "adapter").is_dir() and (page / "runs" / "gain" / "merged").is_dir()
    assert run("peftctl methods") == 0
    assert methods.get("gain").summary in capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_toy_method_keeps_the_contract(name: str, toy: None) -> None:
    for check in contract.FULL:
        check(contract.config("gain"), name)


def test_the_toys_own_test_passes(toy: None) -> None:
    written: dict[str, object] = {}
    exec(compile(FILES["tests/methods/test_gain.py"], "test_gain.py", "exec"), written)
    tests = [value for key, value in written.items() if key.startswith("test_") and callable(value)]
    assert len(tests) == 1
    tests[0]()
