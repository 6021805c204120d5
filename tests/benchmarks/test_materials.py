"""The rows that the benchmark makes are rows, of the length that was asked for."""

from __future__ import annotations

import json
from pathlib import Path

from peftctl.data.chat import Chat
from peftctl.row import Message
from tests import runs
from tests.benchmarks.materials import ROWS, rows


def test_rows_fill_their_length_and_train(tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "rows.jsonl", runs.CONFIGS / "tokenizer"
    rows(file, 600, tokenizer, runs.data("sft"))
    made = [json.loads(line)["messages"] for line in file.read_text("utf-8").splitlines()]
    chat = Chat(tokenizer)
    lengths = [len(chat.dialogue([Message(**turn) for turn in row], "assistant")[0]) for row in made]
    assert len(made) == ROWS and max(lengths) <= 600 and min(lengths) > 450
    contents = runs.document(data={"train": str(file), "validation": None, "limit": 4})
    contents["train"] |= {"max_steps": 1, "eval_every": None}
    assert runs.train(tmp_path / "run", contents)["steps"] == 1
