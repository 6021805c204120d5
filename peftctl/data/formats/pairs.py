"""Preference pairs: `chosen` and `rejected`, texts or messages, after `prompt` (text or messages) or after what both
begin with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftctl.data.formats import values
from peftctl.data.formats.format import Format
from peftctl.data.sources import Json
from peftctl.errors import DataError
from peftctl.row import Example, Message


def _preference(row: Json) -> Example:
    if row["chosen"] == row["rejected"]:
        raise DataError("chosen equals rejected; a pair must differ")
    kinds = {isinstance(row[name], str) for name in ("chosen", "rejected")}
    if len(kinds) == 2:
        raise DataError("of chosen and rejected one is a text and the other is not; both must be of one form")
    return (_texts(row) if kinds == {True} else _dialogues(row))._replace(tools=values.tools(row.get("tools")))


def _texts(row: Json) -> Example:
    """A pair of plain answers: after a plain prompt they stay plain, after messages they are the assistant's turns."""
    chosen, rejected = (values.text(row[name], name) for name in ("chosen", "rejected"))
    if "prompt" not in row:
        return _parted(chosen, rejected)
    if isinstance(row["prompt"], str):
        prompt = values.text(row["prompt"], "prompt")
        return Example("preference", "", prompt_text=prompt, chosen=chosen, rejected=rejected)
    answers = [(Message("assistant", answer),) for answer in (chosen, rejected)]
    return Example("preference", "", values.dialogue(row["prompt"], "prompt"), chosen=answers[0], rejected=answers[1])


def _parted(chosen: str, rejected: str) -> Example:
    """Two texts without a prompt of their own: it is what they begin with, up to the last white space of that."""
    prompt = chosen[: _common(chosen, rejected)]
    while prompt and not (prompt[-1].isspace() and prompt.strip()):
        prompt = prompt[:-1]
    prompt = prompt.rstrip()  # white space belongs to the word after it, as tokenizers have it
    answers = chosen[len(prompt) :], rejected[len(prompt) :]
    if not prompt:
        raise DataError("no 'prompt', and chosen and rejected have no common prompt: they differ from their first word")
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not answer.strip():
            raise DataError(f"{name} is empty after what it shares with the other text")
    return Example("preference", "", prompt_text=prompt, chosen=answers[0], rejected=answers[1])


def _dialogues(row: Json) -> Example:
    chosen, rejected = (values.dialogue(row[name], name) for name in ("chosen", "rejected"))
    common = _common(chosen, rejected)
    prompt = _prompt(row.get("prompt"), chosen[:common])
    answers = chosen[common:], rejected[common:]
    named = dict(zip(("chosen", "rejected"), answers, strict=True))
    for name in (name for name, answer in named.items() if not answer):
        raise DataError(f"{name} is empty: the other one begins with all of its messages")
    for name, answer in named.items():
        if answer[0].role != "assistant":
            raise DataError(
                f"{name} goes on with a message of the {answer[0].role}'s where chosen and rejected part; "
                "a pair has one prompt, and the assistant's answers differ"
            )
        if answer[-1].role != "assistant":
            raise DataError(f"{name} ends with a message of the {answer[-1].role}'s, not with an answer")
    return Example("preference", "", prompt, chosen=answers[0], rejected=answers[1])


def _prompt(given: Any, shared: tuple[Message, ...]) -> tuple[Message, ...]:
    """The prompt of two dialogues, from its own column or from what they share, or both: a question and later turns."""
    if given is None:
        if not shared:
            raise DataError("no common prompt: chosen and rejected differ from their first message on")
        return shared
    if isinstance(given, str):
        message = Message("user", values.text(given, "prompt"))
        if message in shared:
            return shared
        messages: tuple[Message, ...] = (message,)
    else:
        messages = values.dialogue(given, "prompt")
    if shared[: len(messages)] == messages:
        return shared
    if shared and shared[0].role != "assistant":  # the assistant's may be turns that follow the prompt
        raise DataError("chosen and rejected begin with other messages than the prompt has")
    return (*messages, *shared)


def _common(a: Sequence[object], b: Sequence[object]) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (left, right) in enumerate(pairs) if left != right), min(len(a), len(b)))


FORMATS = (
    Format(
        "preference",
        (("chosen", "rejected"),),
        "preference pairs (prompt, chosen, rejected)",
        _preference,
        ("prompt", "tools"),
    ),
)
