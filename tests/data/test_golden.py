"""A row in, labelled tokens out: of each way of writing rows one, as text, what is learnt in double brackets."""

from __future__ import annotations

import pytest

from peftctl.data.chat import Chat
from peftctl.data.formats import FORMATS, decide
from peftctl.objectives import get
from tests.data.labelled import labelled

HEAD, USER, SAYS, END = "<|im_start|>", "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
ADD = {"type": "function", "function": {"name": "add"}}
ASKED = {"role": "user", "content": "cat?"}
SAT, MAT = ({"role": "assistant", "content": text} for text in ("sat", "mat"))
CALL = {"function": {"name": "add", "arguments": '{"a": 1}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
CALLED = f"{HEAD}system\n# Tools\n" + '{"type": "function", "function": {"name": "add"}}' + f"\n{END}\n"
RESULT = f"\n{HEAD}tool\n2{END}\n{SAYS}[[sat{END}]]\n"

GOLDEN = [
    ("sft", "messages", {"messages": [ASKED, SAT]}, [f"{USER}cat?{END}\n{SAYS}[[sat{END}]]\n"]),
    (
        "sft", "messages", {"messages": [ASKED, {**SAT, "train": False}, {**ASKED, "weight": 0.5}, MAT]},
        [f"{USER}cat?{END}\n{SAYS}sat{END}\n{USER}[[0.5|cat?{END}]]\n{SAYS}[[mat{END}]]\n"],
    ),
    (
        "sft", "messages", {"messages": [ASKED, CALLING, {"role": "tool", "content": "2"}, SAT], "tools": [ADD]},
        [f"{CALLED}{USER}cat?{END}\n{SAYS}" + '[[<call>add{"a": 1}</call><|stop|>]]' + RESULT],
    ),
    (
        "sft", "sharegpt",
        {"system": "Purr.",
         "conversations": [{"from": "human", "value": "cat?"}, {"from": "gpt", "value": "sat", "weight": 0},
                           {"from": "human", "value": "on?"}, {"from": "gpt", "value": "mat"}]},
        [f"{HEAD}system\nPurr.{END}\n{USER}cat?{END}\n{SAYS}sat{END}\n{USER}on?{END}\n{SAYS}[[mat{END}]]\n"],
    ),
    (
        "sft", "sharegpt",
        {"conversations": [{"from": "human", "value": "cat?"},
                           {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                           {"from": "observation", "value": "2"}, {"from": "gpt", "value": "sat"}]},
        [f"{USER}cat?{END}\n{SAYS}" + '[[<call>add{"a": 1}</call><|stop|>]]' + RESULT],
    ),
    ("sft", "alpaca", {"instruction": "Say.", "input": "cat", "output": "sat"},
     [f"{USER}Say.\n\ncat{END}\n{SAYS}[[sat{END}]]\n"]),
    ("sft", "completion", {"prompt": "the cat", "completion": " sat"}, ["the cat[[ sat<|eos|>]]"]),
    ("sft", "completion", {"prompt": [ASKED, SAT, ASKED], "completion": "mat"},
     [f"{USER}cat?{END}\n{SAYS}sat{END}\n{USER}cat?{END}\n{SAYS}[[mat{END}]]\n"]),
    ("sft", "text", {"text": "the cat sat"}, ["[[the cat sat<|eos|>]]"]),
    ("dpo", "preference", {"prompt": [ASKED], "chosen": "sat", "rejected": "mat"},
     [f"{USER}cat?{END}\n{SAYS}[[sat{END}]]\n", f"{USER}cat?{END}\n{SAYS}[[mat{END}]]\n"]),
    ("dpo", "preference", {"prompt": "the cat", "chosen": " sat", "rejected": " mat"},
     ["the cat[[ sat<|eos|>]]", "the cat[[ mat<|eos|>]]"]),
    ("dpo", "preference", {"chosen": [ASKED, SAT], "rejected": [ASKED, CALLING], "tools": [ADD]},
     [f"{CALLED}{USER}cat?{END}\n{SAYS}[[sat{END}]]\n",
      f"{CALLED}{USER}cat?{END}\n{SAYS}" + '[[<call>add{"a": 1}</call><|stop|>]]\n']),
    ("kto", "unpaired", {"messages": [ASKED, SAT, ASKED, MAT], "label": False},
     [f"{USER}cat?{END}\n{SAYS}sat{END}\n{USER}cat?{END}\n{SAYS}[[mat{END}]]\n"]),
    ("kto", "unpaired", {"prompt": "the cat", "completion": " sat", "label": True}, ["the cat[[ sat<|eos|>]]"]),
    ("regression", "labelled", {"text": "the cat", "label": 2.5}, ["the ca[[t]]"]),
    ("grpo", "prompt", {"prompt": [ASKED], "answer": "sat"}, [f"{USER}cat?{END}\n{SAYS}"]),
    ("grpo", "prompt", {"prompt": "the cat"}, ["the cat"]),
]  # fmt: skip
NEEDED = {"grpo": {"rewards": [{"name": "json"}]}}


@pytest.fixture(scope="module")
def chat(made):
    return Chat(made("tools", merges=False))


@pytest.mark.parametrize(("objective", "name", "row", "expected"), GOLDEN)
def test_row_in_labelled_tokens_out(chat, objective, name, row, expected):
    chosen = get(objective)
    found = decide("rows", list(row), wanted=chosen.kinds)
    rows = chosen.encode(found.example(row), chat, chosen.config(name=objective, **NEEDED.get(objective, {})))
    assert found.format.name == name
    assert [labelled(chat, (row.ids, row.weights)) for row in rows] == expected


def test_every_format_is_among_them():
    assert {name for _, name, _, _ in GOLDEN} | {name for _, name, *_ in ANSWERED} == set(FORMATS)


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        ("completion", {"prompt": "question", "completion": "answer"}, "the cat?[[sat<|eos|>]]"),
        ("alpaca", {"instruction": "question", "output": "answer"}, f"{USER}the cat?{END}\n{SAYS}[[sat{END}]]\n"),
    ],
)
def test_a_question_and_its_answer_by_a_map_of_columns(chat, name, columns, expected):
    sft = get("sft")
    found = decide("rows", ["question", "answer"], "auto", columns, sft.kinds)
    example = found.example({"question": "the cat?", "answer": "sat"})
    [row] = sft.encode(example, chat, sft.config(name="sft"))
    assert (found.format.name, labelled(chat, (row.ids, row.weights))) == (name, expected)


ANSWERED = [
    ("classification", "labelled", ["plant", "animal"], {"text": "the cat", "label": "animal"}, "the cat=animal"),
    ("classification", "labelled", ["plant", "animal"], {"text": "the cat", "label": 0}, "the cat=plant"),
    ("classification", "labelled", ["no", "yes"], {"text": "cat", "text_pair": "mat", "label": "yes"}, "cat\nmat=yes"),
    ("token-classification", "tagged", ["DET", "NOUN"],
     {"tokens": ["the", "cat", "sat"], "tags": ["DET", "NOUN", None]}, "t=DEThe c=NOUNat sat"),
]  # fmt: skip


@pytest.mark.parametrize(("objective", "name", "labels", "row", "expected"), ANSWERED)
def test_row_in_labels_out(chat, objective, name, labels, row, expected):
    """Each token, and behind it what is to be answered there."""
    chosen = get(objective)
    found = decide("rows", list(row), wanted=chosen.kinds)
    [encoded] = chosen.encode(found.example(row), chat, chosen.config(name=objective, labels=labels))
    told = [
        chat.decode([index], special=True) + (f"={labels[int(target)]}" if weight else "")
        for index, weight, target in zip(encoded.ids, encoded.weights, encoded.targets, strict=True)
    ]
    assert (found.format.name, "".join(told)) == (name, expected)


TURNS = f"{USER}cat?{END}\n{SAYS}sat{END}\n{USER}cat?{END}\n{SAYS}mat{END}\n"


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ("assistant", f"{USER}cat?{END}\n{SAYS}[[sat{END}]]\n{USER}cat?{END}\n{SAYS}[[mat{END}]]\n"),
        ("last", f"{USER}cat?{END}\n{SAYS}sat{END}\n{USER}cat?{END}\n{SAYS}[[mat{END}]]\n"),
        ("all", f"[[{TURNS}]]"),
        (["user"], f"{USER}[[cat?{END}]]\n{SAYS}sat{END}\n{USER}[[cat?{END}]]\n{SAYS}mat{END}\n"),
        (["assistant", "user"], TURNS.replace("cat?" + END, f"[[cat?{END}]]").replace("sat" + END, f"[[sat{END}]]")
         .replace("mat" + END, f"[[mat{END}]]")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("template", ["tools", "generation"])
def test_what_is_trained(made, template, trained, expected):
    chat, sft = Chat(made(template, merges=False)), get("sft")
    example = decide("rows", ["messages"]).example({"messages": [ASKED, SAT, ASKED, MAT]})
    row = sft.encode(example, chat, sft.config(name="sft", trained=trained))[0]
    assert labelled(chat, (row.ids, row.weights)) == expected
