"""Every shipped recipe loads, and trains as a smoke run without a network."""

import json
import shutil
from pathlib import Path

import pytest

from peftctl import commands, methods, recipe
from peftctl.report import read

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("**/*.yaml"))
pytestmark = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
OPTIONS = {"quiet": True}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def folds(path: Path) -> bool:
    block = recipe.load(path).method
    return methods.get(block.name).traits(block).foldable


def check(result: dict[str, object], steps: int, merged: bool) -> None:
    run = Path(str(result["run"]))
    assert recipe.load(run / "recipe.yaml").output == str(run)
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    events = read(run / "metrics.jsonl")
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, steps + 1))
    assert any(event["event"] == "evaluation" for event in events)
    assert f"step-{steps:06d}" in {folder.name for folder in (run / "checkpoints").iterdir()}
    names = {file.name for file in (run / "adapter").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert (result["merged"] is not None) == (run / "merged").is_dir() == merged
    assert result["steps"] == steps


def test_loads_and_is_written_back(path: Path, tmp_path: Path) -> None:
    loaded = recipe.load(path)
    (tmp_path / "again.yaml").write_text(recipe.resolved(loaded))
    assert recipe.load(tmp_path / "again.yaml") == loaded


def test_begins_with_a_comment_a_reader_learns_from(path: Path) -> None:
    assert path.read_text().startswith("# ")


def test_trains_as_a_smoke_run(path: Path) -> None:
    check(commands.train(path, [], {}, True, False, OPTIONS), 2, folds(path))


def test_trains_as_it_is_where_nothing_need_be_fetched(path: Path) -> None:
    loaded = recipe.load(path)
    if all(Path(name).is_file() for name in (loaded.model.name, loaded.data.train)):
        result = commands.train(path, [], {}, False, False, OPTIONS)
        check(result, loaded.train.max_steps or 0, folds(path))
        shutil.rmtree(str(result["run"]))
    else:
        assert path.stem not in ("smoke", "starter")
