"""Columns are recognised or asked about, never guessed; every bad row has its reason."""

from __future__ import annotations

import pytest

from peftctl.data.formats import example, recognise
from peftctl.data.sources import Source
from peftctl.errors import DataError
from peftctl.row import Example, Message

USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "good"), ("assistant", "bad")))
ASKED, SAID, WORSE = Message("user", "q"), Message("assistant", "good"), Message("assistant", "bad")
PAIR = Example("preference", "", (ASKED,), chosen=(SAID,), rejected=(WORSE,))


def source(*rows) -> Source:
    return Source("t.jsonl", [(f"t.jsonl:{i}", row) for i, row in enumerate(rows, 1)], [], "")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, GOOD]}, Example("messages", "", (ASKED, SAID))),
        ({"prompt": "q", "completion": "good"}, Example("completion", "", (), "q", "good")),
        (
            {"prompt": "q", "chosen": "good", "rejected": "bad"},
            Example("preference", "", (), "q", chosen="good", rejected="bad"),
        ),
        ({"prompt": [USER], "chosen": "good", "rejected": "bad"}, PAIR),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, PAIR),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, PAIR),
        ({"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, PAIR),
        ({"prompt": "q", "chosen": [GOOD], "rejected": [BAD]}, PAIR),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, PAIR),
        ({"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]}, PAIR),
    ],
)
def test_a_row_becomes_an_example(row, expected):
    found = recognise(source({**row, "id": 7}))
    assert found.examples == [expected._replace(place="t.jsonl:1")]
    assert (found.kind, found.faults, found.unused) == (expected.kind, [], ("id",))


PAIRS = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("messages", {"messages": "hi"}, "messages must be a list of messages"),
        ("messages", {"messages": []}, "found an empty list"),
        ("messages", {"messages": [USER, 3]}, "messages, message 2 must be an object"),
        (
            "messages",
            {"messages": [USER, {"role": "asistant", "content": "x"}]},
            "message 2 has the role 'asistant'; did",
        ),
        ("messages", {"messages": [USER, {"role": ["user"], "content": "x"}]}, "has the role"),
        ("messages", {"messages": [{"role": "user", "content": ""}, GOOD]}, "message 1 (user): content is empty"),
        ("messages", {"messages": [USER, {"role": "assistant"}]}, "content must be a text; found nothing"),
        ("messages", {"messages": [USER, {**GOOD, "tool_calls": []}]}, "message 2 has 'tool_calls'"),
        ("messages", {"messages": [USER]}, "no assistant turn"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "half a surrogate pair"),
        ("messages", {"prompt": "x"}, "no 'messages'"),
        ("messages", {"messages": None}, "no 'messages'"),
        ("completion", {"prompt": "x", "completion": " \n"}, "completion is empty"),
        ("completion", {"prompt": "x", "completion": 3}, "completion must be a text; found int '3'"),
        ("preference", {"chosen": "a", "rejected": "a", "prompt": "x"}, "chosen equals rejected"),
        ("preference", {"chosen": "a", "rejected": "", "prompt": "x"}, "rejected is empty"),
        ("preference", {"chosen": "a", "rejected": "b"}, "no 'prompt'"),
        ("preference", {"chosen": "a", "rejected": [BAD], "prompt": "x"}, "one is a text and the other is not"),
        ("preference", {"chosen": [GOOD], "rejected": [BAD]}, "no common prompt"),
        ("preference", {**PAIRS, "prompt": "other"}, "the prompt is not among"),
        ("preference", {**PAIRS, "prompt": [USER, GOOD]}, "begin with other messages"),
        ("preference", {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD]}, "chosen has 3 messages"),
        ("preference", {"chosen": [USER, GOOD, USER], "rejected": [USER, BAD]}, "exactly one assistant message"),
        ("preference", {"chosen": [USER], "rejected": [USER, BAD]}, "chosen has 0 messages"),
    ],
)
def test_a_bad_row_has_its_reason(kind, row, reason):
    with pytest.raises(DataError) as caught:
        example(row, kind)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_bad_rows_do_not_hide_good_ones():
    found = recognise(source({"messages": [USER, GOOD]}, {"messages": [USER]}, {"messages": [USER, BAD]}))
    assert [e.place for e in found.examples] == ["t.jsonl:1", "t.jsonl:3"]
    assert [f.place for f in found.faults] == ["t.jsonl:2"]


def test_ambiguous_columns_are_asked_about():
    row = {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]}
    with pytest.raises(DataError, match=r"messages or preference by its columns prompt, chosen.*data\.format"):
        recognise(source(row))
    assert recognise(source(row), "preference").examples == [PAIR._replace(place="t.jsonl:1")]
    assert recognise(source(row), "messages").unused == ("prompt", "chosen", "rejected")


def test_unknown_columns_are_listed_with_what_is_known():
    with pytest.raises(
        DataError, match=r"columns question, answer; known are messages.*prompt \+ completion.*data\.columns"
    ):
        recognise(source({"question": "q", "answer": "a"}))
    with pytest.raises(DataError, match=r"data.format is completion, but there is no column completion; it has prompt"):
        recognise(source({"prompt": "q"}), "completion")
    with pytest.raises(DataError, match="'mesages' is not known; did you mean messages"):
        recognise(source({"prompt": "q"}), "mesages")


def test_columns_are_renamed():
    rows = source({"question": "q", "answer": "good", "prompt": "ignored"})
    found = recognise(rows, columns={"prompt": "question", "completion": "answer"})
    assert found.examples == [Example("completion", "t.jsonl:1", (), "q", "good")]
    assert found.unused == ("prompt",)
    assert (
        recognise(source({"messages": "q", "completion": "good"}), columns={"prompt": "messages"}).kind == "completion"
    )
    with pytest.raises(DataError, match="no column 'quest'; did you mean question"):
        recognise(rows, columns={"prompt": "quest"})
    with pytest.raises(DataError, match="'question' is no column that is read"):
        recognise(rows, columns={"question": "prompt"})
