"""Prompts with completions, which stay plain where they are texts; and raw text, all of which is learnt."""

from __future__ import annotations

from peftctl.data.formats import values
from peftctl.data.formats.format import Format
from peftctl.data.sources import Json
from peftctl.errors import NoLabel
from peftctl.row import Example, Message


def _completion(row: Json) -> Example:
    if isinstance(row["prompt"], str):
        prompt, completion = (values.text(row[name], name) for name in ("prompt", "completion"))
        return Example("completion", "", prompt_text=prompt, completion=completion)
    # what the assistant said before is given, not learnt
    before = tuple(message._replace(weight=0.0) for message in values.dialogue(row["prompt"], "prompt"))
    return Example("completion", "", (*before, *_answer(row)), tools=values.tools(row.get("tools")))


def _answer(row: Json) -> tuple[Message, ...]:
    """The completion of a prompt of messages: a text is the assistant's turn."""
    if isinstance(row["completion"], str):
        return (Message("assistant", values.text(row["completion"], "completion")),)
    answer = values.dialogue(row["completion"], "completion")
    if not any(message.role == "assistant" for message in answer):
        raise NoLabel("no assistant turn in completion; there is nothing to learn from")
    return answer


def _text(row: Json) -> Example:
    return Example("text", "", completion=values.text(row["text"], "text"))


FORMATS = (
    Format(
        "completion",
        (("prompt", "completion"),),
        "prompts with completions (prompt, completion)",
        _completion,
        ("tools",),
    ),
    Format("text", (("text",),), "raw text (text)", _text),
)
