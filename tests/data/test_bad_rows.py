"""Each kind of bad row gives its line, and with `data.on_bad_row: skip` it is counted: faults 36 to 38."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftctl.data.chat import Chat
from peftctl.data.dataset import load
from peftctl.errors import DataError
from peftctl.objectives import get

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
TAGS = {"tokens": ["a", "b"], "tags": ["x", "y"]}


def talk(asked: str = "q", answer: Any = "a", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer, **more}]}


KINDS: dict[str, tuple[str, Any, str]] = {  # the objective, a row or the line's bytes, the reason; by fault
    "36 invalid JSON": ("sft", b'{"messages": [}', "invalid JSON"),
    "36 a line cut off": ("sft", b'{"messages": [{"role": "us', "invalid JSON"),
    "36 invalid UTF-8": ("sft", b'{"messages": "\xff"}', "invalid UTF-8 at byte"),
    "36 NUL": ("sft", b'{"messages": "\x00"}', "invalid JSON: Invalid control character"),
    "36 a lone surrogate": ("sft", talk(answer="\ud800"), "half a surrogate pair"),
    "37 a missing field": ("sft", {"other": 1}, "no 'messages'"),
    "37 null": ("sft", {"messages": None}, "no 'messages'"),
    "37 a wrong type": ("sft", {"messages": "text"}, "must be a list of messages"),
    "37 an extra field": ("sft", talk(mood=1), "has 'mood'"),
    "37 an empty completion": ("sft", talk(answer=""), "is empty"),
    "37 no answer": ("sft", {"messages": talk()["messages"][:1]}, "no assistant turn"),
    "37 nothing to learn": ("sft", talk(train=False), "weight 0"),
    "37 a long prompt": ("sft", talk("q" * 99), "the prompt alone has"),
    "37 a long row": ("sft", talk(answer="a" * 99), "more than data.max_length 60"),
    "37 equal answers": ("dpo", {**PAIR, "rejected": "a"}, "chosen equals rejected"),
    "37 no chosen": ("dpo", {"prompt": "q", "chosen": None, "rejected": "b"}, "no 'chosen'"),
    "37 pairs without a common prompt": (
        "dpo",
        {"chosen": talk("q")["messages"], "rejected": talk("z")["messages"]},
        "",
    ),
    "37 a judgement that is none": ("kto", {"prompt": "q", "completion": "a", "label": "yes"}, "label must be true"),
    "37 a judged answer that is empty": (
        "kto",
        {"prompt": "q", "completion": "", "label": True},
        "completion is empty",
    ),
    "37 a prompt that is a number": ("grpo", {"prompt": 3}, "prompt"),
    "37 an unknown label": ("classification", {"text": "a", "label": "z"}, "label 'z' is none of x, y"),
    "37 a text that is null": ("classification", {"text": None, "label": "x"}, "no 'text'"),
    "37 a label that is no number": ("regression", {"text": "a", "label": "x"}, "label 'x' is no number"),
    "37 a label that is not finite": ("regression", {"text": "a", "label": "nan"}, "label 'nan' is not finite"),
    "37 tags that are too few": ("token-classification", {"tokens": ["a", "b"], "tags": ["x"]}, "2 tokens and 1 tags"),
    "37 tags of which none is learnt": ("token-classification", {**TAGS, "tags": [None, None]}, "would be learnt"),
    "38 an id beyond the vocabulary": ("sft", talk("<|late|>"), "but the base knows ids below"),
}
GOOD = {
    "sft": talk(),
    "dpo": PAIR,
    "kto": {"prompt": "q", "completion": "a", "label": True},
    "grpo": {"prompt": "q"},
    "classification": {"text": "a", "label": "x"},
    "regression": {"text": "a", "label": 1},
    "token-classification": TAGS,
}
NEEDED: dict[str, dict[str, Any]] = {
    "grpo": {"rewards": [{"name": "json"}], "max_new_tokens": 8},
    "classification": {"labels": ["x", "y"]},
    "token-classification": {"labels": ["x", "y"]},
}
SFT = [kind for kind, (objective, _, _) in KINDS.items() if objective == "sft"]


@pytest.fixture(scope="module")
def chat(made):
    from tokenizers import Tokenizer

    folder = made("chatml", merges=False)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|late|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return Chat(folder)


def lines(rows: list[Any]) -> bytes:
    return b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)


def loaded(chat, objective: str, **options):
    chosen = get(objective)
    config, vocabulary = chosen.config(name=objective, **NEEDED.get(objective, {})), chat.vocabulary - 1
    return load("rows.jsonl", chat, chosen, config, max_length=60, vocabulary=vocabulary, **options)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.fault(int(kind[:2]))) for kind in KINDS])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_bad_row_gives_its_line(tmp_path, monkeypatch, chat, kind, place):
    monkeypatch.chdir(tmp_path)
    objective, bad, reason = KINDS[kind]
    good: list[Any] = [GOOD[objective]] * 3
    (tmp_path / "rows.jsonl").write_bytes(lines([*good[:place], bad, *good[place:]]))
    with pytest.raises(DataError) as caught:
        loaded(chat, objective)
    first, last = str(caught.value).split("\n")
    assert first.startswith(f"rows.jsonl:{place + 1}: ") and reason in first
    assert last == "rows.jsonl: 1 of 4 rows cannot be used; data.on_bad_row: skip leaves them out"
    data, report = loaded(chat, objective, on_bad_row="skip")
    assert (report.read, report.kept, report.refused, len(data)) == (4, 3, 1, 3)
    assert [str(fault) for fault in report.faults] == [first]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(mixed=st.lists(st.sampled_from(["", *SFT]), min_size=1, max_size=30))
def test_good_and_bad_rows_in_any_order(tmp_path_factory, monkeypatch, chat, mixed):
    monkeypatch.chdir(tmp_path_factory.getbasetemp())
    with open("rows.jsonl", "wb") as file:
        file.write(lines([KINDS[kind][1] if kind else talk() for kind in mixed]))
    bad = [number for number, kind in enumerate(mixed, 1) if kind]
    if len(bad) == len(mixed):
        with pytest.raises(DataError, match=r"no row can be used|no column messages"):
            loaded(chat, "sft", on_bad_row="skip", format="messages")
        return
    data, report = loaded(chat, "sft", on_bad_row="skip", format="messages")
    assert (report.read, report.refused, report.kept) == (len(mixed), len(bad), len(mixed) - len(bad))
    assert [fault.place for fault in report.faults] == [f"rows.jsonl:{number}" for number in bad[:10]]
    assert list(data.places) == [f"rows.jsonl:{number}" for number, kind in enumerate(mixed, 1) if not kind]
