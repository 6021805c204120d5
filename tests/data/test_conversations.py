"""Random conversations in one batch: what its segments hold is the rendered template, what is learnt the trained turns.

The text with what is learnt in double brackets is written here a second time, by hand for each template.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftctl.batch import build
from peftctl.data.chat import Chat
from peftctl.data.templates import chosen
from peftctl.row import Message, Row
from tests.data.labelled import labelled
from tests.data.test_chat import CONTENT, MARKS
from tests.data.test_templates import folders as folders

Turn = Callable[[str, str, str, str], str]  # role, content, and what opens and closes what is learnt
ROLES = ("system", "user", "assistant")


def vicuna(role: str, said: str, a: str, z: str) -> str:
    if role == "assistant":
        return f"ASSISTANT:{a} {said}<|eos|>{z}\n"
    title = {"system": "", "user": "USER: "}[role]
    return f"{title}{a}{said}\n{z}"  # without a special token the turn ends with its line


def alpaca(role: str, said: str, a: str, z: str) -> str:
    if role == "assistant":
        return f"### Response:\n{a}{said}<|eos|>{z}\n\n"
    title = {"system": "", "user": "### Instruction:\n"}[role]
    return f"{title}{a}{said}\n\n{z}"


WRITTEN: dict[str, Turn] = {
    "chatml": lambda role, said, a, z: f"<|im_start|>{role}\n{a}{said}<|im_end|>{z}\n",
    "llama3": lambda role, said, a, z: f"<|start_header_id|>{role}<|end_header_id|>\n\n{a}{said.strip()}<|eot_id|>{z}",
    "alpaca": alpaca,
    "vicuna": vicuna,
}


@st.composite
def conversations(draw: Any) -> list[Message]:
    """System or not, then turns, some with weights of their own, the last answer among what is learnt."""
    said = CONTENT | MARKS
    weights = st.sampled_from([None, None, 0.0, 0.5, 1.0])
    # a system prompt may hold the very first token, which nothing predicts
    start = [Message("system", draw(said), draw(st.sampled_from([None, 0.0])))] if draw(st.booleans()) else []
    turns = draw(st.integers(1, 3))
    talk = [Message(ROLES[1 + i % 2], draw(said), draw(weights)) for i in range(2 * turns - 1)]
    return [*start, *talk, Message("assistant", draw(said), draw(st.sampled_from([None, 2.0])))]


TRAINED = st.sampled_from(["assistant", "last", ["assistant"], ["user", "assistant"]])


def expected(name: str, messages: list[Message], trained: str | list[str], opening: str) -> str:
    parts = [opening]
    for index, message in enumerate(messages):
        roles = ["assistant"] if isinstance(trained, str) else trained
        default = float(message.role in roles)
        weight = default if message.weight is None else message.weight
        if trained == "last" and index < len(messages) - 1:
            weight = 0.0
        marks = ("", "") if not weight else ("[[" if weight == 1 else f"[[{weight:g}|", "]]")
        parts.append(WRITTEN[name](message.role, message.content, *marks))
    text = "".join(parts)
    return text.replace("]][[", "")  # neighbours of one weight are one run


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("name", WRITTEN)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(talks=st.lists(conversations(), min_size=1, max_size=4), trained=TRAINED)
def test_segments_hold_the_dialogue_and_labels_the_trained_turns(folders, name, bos, talks, trained):
    chat = KNOWN.setdefault((name, bos), Chat(folders[False, bos], chosen(name)))
    rows = [Row(*chat.dialogue(talk, trained), example=number) for number, talk in enumerate(talks)]
    batch = build(rows)
    learnt: list[list[float]] = [[0.0] * len(row.ids) for row in rows]
    for source, target, owner, weight in zip(*(one.tolist() for one in batch.labels), strict=True):
        at = batch.row_tokens[owner].tolist().index(source) + 1  # predicted by the token before it
        assert rows[owner].ids[at] == target
        learnt[owner][at] = weight
    for number, talk in enumerate(talks):
        ids = batch.ids[batch.row_tokens[number]].tolist()
        assert chat.decode(ids, special=True) == chat.template.render(talk).text
        assert labelled(chat, (tuple(ids), tuple(learnt[number]))) == expected(
            name, talk, trained, "<|bos|>" if bos else ""
        )


KNOWN: dict[tuple[str, bool], Chat] = {}
