"""Prompts and answers for encoder-decoders are framed as transformers frames them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from peftctl import objectives
from peftctl.data.dataset import load
from peftctl.data.encoding import Job, Written, job_of
from peftctl.data.sides import Sides, chat_of
from peftctl.errors import DataError
from peftctl.row import Message, Row
from tests.data import conftest

SFT = objectives.get("sft")
CONFIG = SFT.config(name="sft")
START = 3
FRAMES = {"T5": "$A <|eos|>", "BART": "<|bos|> $A <|eos|>", "none": "$A"}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant:{% endif %}"
ASKED = [
    Message("user", "the cat"),
    Message("assistant", "sat"),
    Message("user", "on"),
    Message("assistant", "the mat"),
]


def sides(folder: Path, frame: str, template: str | None = None) -> Sides:
    made = conftest.tokenizer()
    special = [(token, made.token_to_id(token)) for token in ("<|bos|>", "<|eos|>")]
    made.post_processor = processors.TemplateProcessing(single=FRAMES[frame], special_tokens=special)
    conftest.write(folder, made, None)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return Sides(START, folder)


def encoded(chat: Sides, tmp_path: Path, row: dict[str, Any], **options: Any) -> Row:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    dataset, report = load(tmp_path / "rows.jsonl", chat, SFT, CONFIG, **options)
    ((row_,),) = dataset.examples
    assert report.reach == row_.reach and report.ended == 1
    return row_


@pytest.mark.parametrize("frame", FRAMES)
def test_both_sides_are_as_transformers_frames_them(frame: str, tmp_path: Path) -> None:
    chat = sides(tmp_path / "tokenizer", frame)
    row = encoded(chat, tmp_path, {"prompt": "the cat sat on", "completion": "the mat"})
    theirs = PreTrainedTokenizerFast.from_pretrained(chat.folder, eos_token="<|eos|>")
    expected = theirs("the cat sat on", text_target="the mat")
    labels = expected["labels"] + [chat.eos] * (frame == "none")
    assert list(row.ids) == [*expected["input_ids"], START, *labels]
    assert row.source == len(expected["input_ids"])
    assert row.weights == (0.0,) * (row.source + 1) + (1.0,) * len(labels)
    assert chat.prompt("the cat sat on") == row.ids[: row.source]  # what is asked is what was learnt


def test_the_last_turn_answers_the_rendered_ones(tmp_path: Path) -> None:
    chat = sides(tmp_path, "T5", TEMPLATE)
    ids, weights = chat.dialogue(ASKED, "last")
    row = chat.sided(Row(ids, weights))
    assert chat.decode(row.ids[: row.source]) == "user: the cat\nassistant: sat\nuser: on\nassistant:"
    assert row.ids[: row.source] == chat.render_prompt(ASKED[:3])
    assert chat.decode(row.ids[row.source + 1 :], special=True) == "the mat<|eos|>"
    assert set(chat.dialogue([*ASKED[:3], Message("assistant", "mat", 0.5)], "last")[1]) == {0.0, 0.5}


@pytest.mark.parametrize(
    ("messages", "trained", "said"),
    [
        (ASKED, "assistant", "message 2 would be learnt, but an encoder-decoder answers once"),
        (ASKED, ["user"], "message 1 would be learnt"),
        (ASKED[:3], "assistant", "message 2 would be learnt"),
        ([*ASKED[:1], Message("assistant", "", None, (("tool_calls", [{"name": "f"}]),))], "last", "2 calls tools"),
    ],
)
def test_what_does_not_answer_at_the_end_is_refused(
    messages: list[Message], trained: Any, said: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=said):
        sides(tmp_path, "T5", TEMPLATE).dialogue(messages, trained)


def test_messages_need_a_template_and_answers_an_end(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no chat template"):
        sides(tmp_path / "one", "T5").dialogue(ASKED, "last")
    endless = Sides(START, conftest.write(tmp_path / "two", conftest.tokenizer(), None, eos_token=None))
    with pytest.raises(DataError, match="no eos_token"):
        endless.completion("a", "b")


def test_truncation_cuts_the_prompts_start_or_the_answers_end(tmp_path: Path) -> None:
    chat = sides(tmp_path / "tokenizer", "BART")
    given = {"prompt": "x" * 20, "completion": "y" * 9}
    whole = encoded(chat, tmp_path, given)
    left = encoded(chat, tmp_path, given, max_length=len(whole.ids) - 6, truncate="left")
    assert left.ids[left.source :] == whole.ids[whole.source :] and left.source == whole.source - 6
    (tmp_path / "rows.jsonl").write_text(json.dumps(given) + "\n")
    for length, how in ((12, "left"), (whole.source, "right"), (whole.source, "refuse")):
        with pytest.raises(DataError):
            load(tmp_path / "rows.jsonl", chat, SFT, CONFIG, max_length=length, truncate=how)
    dataset, _ = load(tmp_path / "rows.jsonl", chat, SFT, CONFIG, max_length=len(whole.ids) - 3, truncate="right")
    ((cut,),) = dataset.examples
    assert (cut.ids, cut.source) == (whole.ids[:-3], whole.source)


def test_an_empty_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no token of the prompt is left for the encoder to read"):
        sides(tmp_path, "none").sided(Row((START, 9), (0.0, 1.0)))


def test_another_process_encodes_the_same(tmp_path: Path) -> None:
    chat = sides(tmp_path, "T5")
    written = Written("rows", ("prompt", "completion"), "auto", None, SFT.kinds)
    job = Job(chat, SFT, CONFIG, written, written.decide(), 64, None)
    again = job_of(json.loads(json.dumps(job.document()))).chat
    assert isinstance(again, Sides) and again.completion("the", "cat") == chat.completion("the", "cat")
    assert again.fingerprint() == chat.fingerprint() != chat_of(None, tmp_path).fingerprint()
    assert chat.fingerprint() != Sides(START + 1, tmp_path).fingerprint()
