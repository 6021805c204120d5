"""Dialogues as OpenAI, ShareGPT and Alpaca write them: all become messages, which the chat template renders."""

from __future__ import annotations

from typing import Any

from peftctl.data.formats import values
from peftctl.data.formats.format import Format
from peftctl.data.sources import Json
from peftctl.errors import DataError, NoLabel, suggest
from peftctl.row import Example, Message

SPEAKERS = {
    **{"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"function_call": "assistant", "observation": "tool", "tool": "tool"},
}


def _openai(row: Json) -> Example:
    return _example(values.dialogue(row["messages"], "messages"), "messages", row)


def _sharegpt(row: Json) -> Example:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"conversations must be a list of turns {{from, value}}; found {values.found(turns)}")
    messages = tuple(_turn(turn, f"conversations, turn {number}") for number, turn in enumerate(turns, start=1))
    return _example((*_system(row), *messages), "conversations", row)


def _turn(turn: Any, where: str) -> Message:
    if isinstance(turn, dict) and "role" in turn and "content" in turn:
        raise DataError(
            f"{where} is a message {{role, content}}: set data.format: messages and "
            "data.columns: {messages: conversations}"
        )
    if not isinstance(turn, dict):
        raise DataError(f"{where} must be an object {{from, value}}; found {values.found(turn)}")
    speaker = turn.get("from")
    if speaker not in SPEAKERS:
        near = suggest(speaker, SPEAKERS) if isinstance(speaker, str) else ""
        raise DataError(f"{where} is from {speaker!r}{near}; known are {', '.join(SPEAKERS)}")
    extra = [key for key, item in turn.items() if key not in ("from", "value", *values.COUNTED) and item is not None]
    if extra:
        raise DataError(f"{where} has {values.listed(map(repr, extra))}; beside from and value it may have weight")
    said = values.text(turn.get("value"), f"{where} ({speaker}): value")
    counts = values.weight(turn, where)
    if speaker != "function_call":
        return Message(SPEAKERS[speaker], said, counts)
    called = values.decoded(said, f"{where} (function_call): value")
    called = called if isinstance(called, list) else [called]
    wrapped = [{"type": "function", "function": call} for call in called]
    return Message("assistant", "", counts, (("tool_calls", values.calls(wrapped, where)),))


def _alpaca(row: Json) -> Example:
    """The instruction with its input is what the user says, the output what the assistant answers."""
    asked, given = values.text(row["instruction"], "instruction"), row.get("input", "")
    if not isinstance(given, str):
        raise DataError(f"input must be a text; found {values.found(given)}")
    said = f"{asked}\n\n{values.text(given, 'input')}" if given.strip() else asked
    last = Message("user", said), Message("assistant", values.text(row["output"], "output"))
    return _example((*_system(row), *_history(row.get("history")), *last), "instruction", row)


def _history(value: Any) -> tuple[Message, ...]:
    """Earlier turns, as pairs of what was asked and what was answered."""
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise DataError(f"history must be a list of pairs [asked, answered]; found {values.found(value)}")
    return tuple(
        Message(role, values.text(said, f"history, pair {number}"))
        for number, pair in enumerate(value, start=1)
        for role, said in zip(("user", "assistant"), pair, strict=True)
    )


def _system(row: Json) -> tuple[Message, ...]:
    """A system prompt in a column of its own; an empty one is none."""
    system = row.get("system", "")
    if not isinstance(system, str):
        raise DataError(f"system must be a text; found {values.found(system)}")
    return (Message("system", values.text(system, "system")),) if system.strip() else ()


def _example(messages: tuple[Message, ...], column: str, row: Json) -> Example:
    if not any(message.role == "assistant" for message in messages):
        raise NoLabel(f"no assistant turn in {column}; there is nothing to learn from")
    return Example("messages", "", messages, tools=values.tools(row.get("tools")))


FORMATS = (
    Format("messages", (("messages",),), "messages", _openai, ("tools",)),
    Format(
        "sharegpt",
        (("conversations",),),
        "conversations (conversations: from, value)",
        _sharegpt,
        ("system", "tools"),
    ),
    Format(
        "alpaca",
        (("instruction", "output"),),
        "instructions with outputs (instruction, input, output)",
        _alpaca,
        ("input", "system", "history"),
    ),
)
