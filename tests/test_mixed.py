"""A run on several sources: what run.json says of them, gone on with bit for bit, refused once one has changed."""

from __future__ import annotations

import json
import shutil

import pytest

from peftctl.errors import InputError, Stopped
from tests import runs

SOURCES = [("messages.jsonl", 2.0, None), ("plain.csv", 1.0, {"completion": "answer"})]


@pytest.fixture
def contents(tmp_path):
    """A recipe of two sources in shares."""
    train = []
    for name, weight, columns in SOURCES:
        shutil.copy(runs.CONFIGS / "data" / name, tmp_path / name)
        train.append({"path": str(tmp_path / name), "weight": weight, "columns": columns})
    return runs.document(data={"train": train, "validation": 0.25}, train={"save_every": 2, "keep": 9})


def test_a_mix_is_gone_on_with_bit_for_bit(tmp_path, contents):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    runs.train(whole, contents)
    with pytest.raises(Stopped), runs.stopped_after(2, stopped):
        runs.train(stopped, contents)
    runs.train(stopped, contents, resume=True)
    assert runs.bits(stopped) == runs.bits(whole) and runs.untimed(stopped) == runs.untimed(whole)
    train = json.loads((whole / "run.json").read_text())["data"]["train"]
    first, second = train["sources"].values()
    assert first["file"].endswith("messages.jsonl") and second["file"].endswith("plain.csv")
    assert len(first["sha256"]) == 64 and first["sha256"] != second["sha256"]
    assert first["examples"] + second["examples"] == train["examples"] == first["each_epoch"] + second["each_epoch"]
    assert first["each_epoch"] == round(train["examples"] * 2 / 3)


@pytest.mark.fault(39)
def test_a_mix_of_which_one_source_changed_is_refused(tmp_path, contents):
    runs.train(tmp_path / "run", contents)
    with (tmp_path / "plain.csv").open("a") as file:
        file.write("What is new?, A row.\n")
    contents["train"]["max_steps"] = 6
    with pytest.raises(InputError, match=r"the data's content.*sources\.2\.sha256"):
        runs.train(tmp_path / "run", contents, resume=True)
