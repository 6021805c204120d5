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
]  # fmt: skip


@pytest.fixture(scope="module")
def chat(made):
    return Chat(made("tools", merges=False))


@pytest.mark.parametrize(("objective", "name", "row", "expected"), GOLDEN)
def test_row_in_labelled_tokens_out(chat, objective, name, row, expected):
    chosen = get(objective)
    found = decide("rows", list(row), wanted=chosen.kinds)
    rows = chosen.encode(found.example(row), chat, chosen.config(name=objective))
    assert found.format.name == name
    assert [labelled(chat, (row.ids, row.weights)) for row in rows] == expected


def test_every_format_is_among_them():
    elsewhere = {"tagged", "prompt"}  # test_labelled_rows.py; and a prompt alone has no answer yet
    assert {name for _, name, _, _ in GOLDEN} >= set(FORMATS) - elsewhere


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
