"""Columns are recognised or asked about, never guessed; every bad row has its reason."""

from __future__ import annotations

import pytest

from peftctl import row
from peftctl.data.formats import FORMATS, example, recognise
from peftctl.data.sources import Source
from peftctl.errors import DataError
from peftctl.row import Example, Message

USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "good"), ("assistant", "bad")))
ASKED, SAID, WORSE = Message("user", "q"), Message("assistant", "good"), Message("assistant", "bad")
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}


def calling(arguments: object) -> dict:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


CALL = calling({})
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
        (
            {"chosen": "Q: what? A: I think so.", "rejected": "Q: what? A: I know."},
            Example("preference", "", (), "Q: what? A: I", chosen=" think so.", rejected=" know."),
        ),
        (
            {"chosen": "Q: what?\n\nyes", "rejected": "Q: what?\n\nyes, no"},
            Example("preference", "", (), "Q: what?", chosen="\n\nyes", rejected="\n\nyes, no"),
        ),
        (
            {"prompt": [USER, BAD, USER], "chosen": [GOOD], "rejected": [BAD]},
            PAIR._replace(messages=(ASKED, WORSE, ASKED)),
        ),
        (
            {"chosen": [USER, BAD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]},
            PAIR._replace(messages=(ASKED, WORSE, ASKED)),
        ),
    ],
)
def test_a_row_becomes_an_example(row, expected):
    found = recognise(source({**row, "id": 7}))
    assert found.examples == [expected._replace(place="t.jsonl:1")]
    assert (found.kind, found.faults, found.unused) == (expected.kind, [], ("id",))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, GOOD]},
        {"prompt": [USER], "completion": "good"},
        {"prompt": [USER], "completion": [GOOD]},
        {"prompt": "q", "completion": "good"},
        {"prompt": "q", "completion": "good", "messages": None},
    ],
)
@pytest.mark.parametrize("label", [True, False])
def test_a_judged_answer_becomes_an_example(row, label):
    found = recognise(source({**row, "label": label, "id": 7}), wanted={"unpaired"})
    expected = Example("unpaired", "t.jsonl:1", (ASKED, SAID), label=label)
    if isinstance(row.get("prompt"), str):
        expected = Example("unpaired", "t.jsonl:1", (), "q", "good", label=label)
    assert (found.kind, found.examples, found.unused) == ("unpaired", [expected], ("id",))


PAIRS = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
PLAIN = {"prompt": "q", "completion": "good"}


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
        ("messages", {"messages": [USER, {**GOOD, "mood": "good"}]}, "message 2 has 'mood'; beside its role a"),
        ("messages", {"messages": [USER, {**GOOD, "train": 1}]}, "message 2: train must be true or false"),
        ("messages", {"messages": [USER, {**GOOD, "weight": -1}]}, "message 2: weight must be a number from 0 on"),
        ("messages", {"messages": [USER, {**GOOD, "weight": True}]}, "weight must be a number"),
        ("messages", {"messages": [USER, {**GOOD, "weight": 1, "train": False}]}, "they disagree"),
        ("messages", {"messages": [USER, {**CALL, "tool_calls": {}}]}, "message 2: tool_calls must be a list"),
        ("messages", {"messages": [USER, {**CALL, "tool_calls": [{"function": {}}]}]}, "tool call 1 must have a funct"),
        ("messages", {"messages": [USER, calling("{")]}, "tool call 1: arguments is no JSON: str '{'"),
        ("messages", {"messages": [USER, calling("[1]")]}, "arguments must be an object; found list '[1]'"),
        ("messages", {"messages": [USER, GOOD], "tools": {"name": "f"}}, "tools must be a list of objects; found dict"),
        ("messages", {"messages": [USER, GOOD], "tools": "f"}, "tools is no JSON: str 'f'"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, GOOD]}, "type 'image_url'"),
        ("sharegpt", {"conversations": []}, "conversations must be a list of turns {from, value}; found an empty"),
        ("sharegpt", {"conversations": [HUMAN, 3]}, "conversations, turn 2 must be an object"),
        ("sharegpt", {"conversations": [USER, GOOD]}, "set data.format: messages and data.columns: {messages: conv"),
        (
            "sharegpt",
            {"conversations": [HUMAN, {"from": "gtp", "value": "x"}]},
            "turn 2 is from 'gtp'; did you mean gpt",
        ),
        ("sharegpt", {"conversations": [HUMAN, {"from": "gpt"}]}, "turn 2 (gpt): value must be a text; found nothing"),
        (
            "sharegpt",
            {"conversations": [HUMAN, {**GPT, "markdown": 1}]},
            "turn 2 has 'markdown'; beside from and value",
        ),
        ("sharegpt", {"conversations": [HUMAN]}, "no assistant turn in conversations"),
        (
            "sharegpt",
            {"conversations": [HUMAN, {"from": "function_call", "value": "f(x)"}]},
            "(function_call): value is no",
        ),
        ("sharegpt", {"conversations": [HUMAN, GPT], "system": 3}, "system must be a text"),
        ("alpaca", {"instruction": "q"}, "no 'output'; a row of instructions"),
        ("alpaca", {"instruction": "q", "output": ""}, "output is empty"),
        ("alpaca", {"instruction": "q", "input": 3, "output": "a"}, "input must be a text"),
        ("alpaca", {"instruction": "q", "output": "a", "history": ["q", "a"]}, "history must be a list of pairs"),
        ("text", {"text": " "}, "text is empty"),
        ("text", {"text": ["a"]}, "text must be a text; found list"),
        ("completion", {"prompt": [USER], "completion": [USER]}, "no assistant turn in completion"),
        ("messages", {"messages": [USER]}, "no assistant turn"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "half a surrogate pair"),
        ("messages", {"prompt": "x"}, "no 'messages'"),
        ("messages", {"messages": None}, "no 'messages'"),
        ("completion", {"prompt": "x", "completion": " \n"}, "completion is empty"),
        ("completion", {"prompt": "x", "completion": 3}, "completion must be a text; found int '3'"),
        ("preference", {"chosen": "a", "rejected": "a", "prompt": "x"}, "chosen equals rejected"),
        ("preference", {"chosen": "a", "rejected": "", "prompt": "x"}, "rejected is empty"),
        ("preference", {"chosen": "a", "rejected": "b"}, "no 'prompt', and chosen and rejected have no common prompt"),
        ("preference", {"chosen": "Yes, it is", "rejected": "Yesterday it was"}, "no common prompt"),
        ("preference", {"chosen": "The cat ", "rejected": "The cat sat"}, "chosen is empty after what it shares"),
        ("unpaired", PLAIN, "no 'label'; a row of single judged answers"),
        ("unpaired", {"messages": [USER, GOOD]}, "no 'label'"),
        ("unpaired", {"prompt": "q", "label": True}, "no 'completion'"),
        ("unpaired", {**PLAIN, "label": 1}, "label must be true (a desirable answer) or false; found int '1'"),
        ("unpaired", {**PLAIN, "label": "true"}, "label must be true"),
        ("unpaired", {**PLAIN, "label": None}, "no 'label'"),
        ("unpaired", {**PLAIN, "completion": " ", "label": True}, "completion is empty"),
        ("unpaired", {**PLAIN, "completion": [GOOD], "label": True}, "completion must be a text"),
        ("unpaired", {"prompt": [USER], "completion": [GOOD, USER], "label": True}, "exactly one assistant message"),
        ("unpaired", {"messages": [USER, GOOD, USER], "label": True}, "which is the user's, not the assistant's"),
        ("unpaired", {"messages": [USER, GOOD], "label": True, "prompt": "q"}, "one of them is meant"),
        ("preference", {"chosen": "a", "rejected": [BAD], "prompt": "x"}, "one is a text and the other is not"),
        ("preference", {"chosen": [GOOD], "rejected": [BAD]}, "no common prompt"),
        ("preference", {**PAIRS, "prompt": "other"}, "begin with other messages than the prompt has"),
        ("preference", {**PAIRS, "prompt": [USER, GOOD]}, "begin with other messages"),
        (
            "preference",
            {"chosen": [USER, GOOD, USER], "rejected": [USER, BAD]},
            "chosen ends with a message of the user",
        ),
        ("preference", {"chosen": [USER], "rejected": [USER, BAD]}, "chosen is empty: the other one begins with all"),
        ("preference", {"chosen": [USER, GOOD, USER, BAD], "rejected": [USER, GOOD]}, "rejected is empty"),
        (
            "preference",
            {"chosen": [USER, GOOD], "rejected": [USER, USER, BAD]},
            "rejected goes on with a message of the",
        ),
    ],
)
def test_a_bad_row_has_its_reason(kind, row, reason):
    with pytest.raises(DataError) as caught:
        example(row, kind)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


MORE, SYSTEM = ({"role": role, "content": "and then?"} for role in ("user", "system"))


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared"),
    [
        ([USER, GOOD, MORE, GOOD], [USER, GOOD, MORE, BAD], 3),  # a history of several turns
        ([USER, GOOD, MORE, GOOD], [USER, BAD], 1),  # answers of several turns, not of as many
        ([USER, GOOD, MORE, GOOD, MORE, BAD], [USER, GOOD, MORE, BAD, USER, GOOD], 3),
        ([SYSTEM, USER, GOOD, MORE, GOOD], [SYSTEM, USER, GOOD, MORE, BAD], 4),
    ],
)
def test_a_pair_parts_at_the_first_answer_that_differs(chosen, rejected, shared):
    everything = [tuple(Message(**m) for m in side) for side in (chosen, rejected)]
    question = next(n for n, m in enumerate(chosen) if m["role"] == "user") + 1
    rows = [
        {"chosen": chosen, "rejected": rejected},
        {"chosen": chosen, "rejected": rejected, "prompt": USER["content"]},
        {"chosen": chosen, "rejected": rejected, "prompt": chosen[:question]},
        # the question in its own column alone, and all turns after it as the answers
        {"chosen": chosen[question:], "rejected": rejected[question:], "prompt": chosen[:question]},
    ]
    for one in rows:
        found = example(one, "preference")
        assert found.messages == everything[0][:shared]
        assert (found.chosen, found.rejected) == tuple(side[shared:] for side in everything)


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


def test_what_the_objective_learns_from_decides_where_the_columns_fit_several():
    both = source({**PLAIN, "label": True})
    with pytest.raises(DataError, match="could be completion or unpaired by its columns prompt, completion, label"):
        recognise(both)
    assert recognise(both, wanted={"unpaired"}).kind == "unpaired"
    alone = recognise(both, wanted={"messages", "completion"})
    assert alone.kind == "completion" and alone.unused == ("label",)
    assert recognise(source(PLAIN), wanted={"unpaired"}).kind == "completion"  # to be refused by name
    named = recognise(
        source({"q": "q", "a": "good", "ok": True}),
        columns={"prompt": "q", "completion": "a", "label": "ok"},
        wanted={"unpaired"},
    )
    assert named.examples == [Example("unpaired", "t.jsonl:1", (), "q", "good", label=True)]


TOLD = (("tool_calls", [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]),)
CALLED = Message("assistant", "", None, TOLD)
ADD = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        (
            "messages",
            {"messages": [USER, calling('{"a": 1}'), {"role": "tool", "content": "2", "tool_call_id": "1"}, GOOD],
             "tools": [ADD]},
            Example(
                "messages", "",
                (ASKED, CALLED, Message("tool", "2", None, (("tool_call_id", "1"),)), SAID),
                tools=(ADD,),
            ),
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {**GOOD, "tool_calls": []}],
             "tools": '[{"type": "function", "function": {"name": "add"}}]'},
            Example("messages", "", (ASKED, SAID), tools=(ADD,)),
        ),
        (
            "messages",
            {"messages": [USER, {**BAD, "train": False}, USER, {**GOOD, "weight": 0.5}, {**USER, "train": True}, GOOD]},
            Example(
                "messages", "",
                (ASKED, WORSE._replace(weight=0), ASKED, SAID._replace(weight=0.5), ASKED._replace(weight=1), SAID),
            ),
        ),
        (
            "sharegpt",
            {"system": "Be brief.", "conversations": [HUMAN, {**GPT, "weight": 0}, HUMAN, GPT]},
            Example("messages", "", (Message("system", "Be brief."), ASKED, SAID._replace(weight=0.0), ASKED, SAID)),
        ),
        (
            "sharegpt",
            {"conversations": [HUMAN, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                               {"from": "observation", "value": "2"}, GPT], "tools": ""},
            Example(
                "messages", "",
                (ASKED,
                 Message("assistant", "", None,
                         (("tool_calls", [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]),)),
                 Message("tool", "2"), SAID),
            ),
        ),
        ("alpaca", {"instruction": "q", "input": "", "output": "good"}, Example("messages", "", (ASKED, SAID))),
        (
            "alpaca",
            {"instruction": "Add.", "input": "1 and 1", "output": "2", "system": "Sums.", "history": [["q", "good"]]},
            Example(
                "messages", "",
                (Message("system", "Sums."), ASKED, SAID,
                 Message("user", "Add.\n\n1 and 1"), Message("assistant", "2")),
            ),
        ),
        ("text", {"text": "Once upon a time"}, Example("text", "", completion="Once upon a time")),
        (
            "completion",
            {"prompt": [USER, BAD, USER], "completion": [GOOD]},
            Example(
                "completion", "", (*(m._replace(weight=0.0) for m in (ASKED, WORSE, ASKED)), SAID)
            ),
        ),
    ],
)  # fmt: skip
def test_every_way_of_writing_a_row(name, row, expected):
    found = recognise(source({**row, "id": 7}))
    assert found.faults == [] and found.examples == [expected._replace(place="t.jsonl:1")]
    assert (found.format.name, found.kind, found.unused) == (name, expected.kind, ("id",))


def test_the_table_of_formats_is_that_of_the_recipe():
    assert list(FORMATS) == list(row.FORMATS)


def test_likely_columns_are_asked_about_not_guessed():
    with pytest.raises(DataError, match=r"perhaps as \{prompt: question, completion: answer\}.*output: answer\}"):
        recognise(source({"question": "q", "answer": "good"}))
    with pytest.raises(DataError, match=r"rename with data\.columns$"):
        recognise(source({"question": "q", "query": "q", "answer": "good"}))
    asked = {"question": "q", "answer": "good"}
    assert recognise(source(asked), columns={"instruction": "question", "output": "answer"}).examples == [
        Example("messages", "t.jsonl:1", (ASKED, SAID))
    ]


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
