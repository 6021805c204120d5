"""The values of a row, checked: texts, dialogues, tools. Each raises DataError naming what is wrong and where."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from peftctl.errors import DataError, suggest
from peftctl.row import Message

ROLES = ("system", "user", "assistant", "tool")
SHOWN = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")  # what templates know beside content
COUNTED = ("train", "weight")


def dialogue(value: Any, name: str) -> tuple[Message, ...]:
    """A JSON value as messages {role, content}. Raises DataError naming the first wrong one, counted from 1."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{name} must be a list of messages {{role, content}}; found {found(value)}")
    return tuple(_message(item, f"{name}, message {number}") for number, item in enumerate(value, start=1))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"{where} must be an object {{role, content}}; found {found(value)}")
    value = {key: item for key, item in value.items() if item is not None}
    role = value.get("role")
    if role not in ROLES:
        near = suggest(role, ROLES) if isinstance(role, str) else ""
        raise DataError(f"{where} has the role {role!r}{near}; known are {', '.join(ROLES)}")
    extra = [key for key in value if key not in ("role", "content", *SHOWN, *COUNTED)]
    if extra:
        known = ", ".join(("content", *SHOWN, *COUNTED))
        raise DataError(f"{where} has {listed(map(repr, extra))}; beside its role a message may have {known}")
    more = {key: item for key, item in value.items() if key in SHOWN and item != []}  # no calls: not a caller
    if "tool_calls" in more:
        more["tool_calls"] = calls(more["tool_calls"], where)
    return Message(
        role,
        _content(value, bool(more.get("tool_calls")), f"{where} ({role}): content"),
        weight(value, where),
        tuple(more.items()),
    )


def _content(value: Mapping[str, Any], calling: bool, where: str) -> str:
    """The text of a message, which may be written in parts; one that calls tools needs none."""
    content = value.get("content")
    if isinstance(content, list) and content:
        content = "".join(_part(part, where) for part in content)
    # no content is an empty one: a template would write "None" of the other
    return "" if calling and content in (None, "") else text(content, where)


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else found(part)
        raise DataError(f"{where} has a part of the type {kind!r}; only parts {{type: text, text}} are read")
    content: str = part["text"]
    return content


def weight(value: Mapping[str, Any], where: str) -> float | None:
    """What a message's labels count, by its `train` or `weight`; None where it does not say."""
    train, given = value.get("train"), value.get("weight")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{where}: train must be true or false; found {found(train)}")
    if given is None:
        return None if train is None else float(train)
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < float("inf"):
        raise DataError(f"{where}: weight must be a number from 0 on; found {found(given)}")
    if train is not None and train != bool(given):
        raise DataError(f"{where} has train: {str(train).lower()} and weight: {given}; they disagree")
    return float(given)


def calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls, their arguments as objects: OpenAI writes them as JSON in a text, which templates would quote."""
    if not isinstance(value, list):
        raise DataError(f"{where}: tool_calls must be a list; found {found(value)}")
    return [_call(item, f"{where}, tool call {number}") for number, item in enumerate(value, start=1)]


def _call(value: Any, where: str) -> dict[str, Any]:
    inner = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise DataError(f"{where} must have a function {{name, arguments}}; found {found(value)}")
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        arguments = decoded(arguments, f"{where}: arguments")
    if not isinstance(arguments, dict):
        raise DataError(f"{where}: arguments must be an object; found {found(arguments)}")
    inner = {**inner, "arguments": arguments}
    return {**value, "function": inner} if "function" in value else inner


def tools(value: Any) -> tuple[Any, ...]:
    """What the assistant may call: a list of objects, or JSON of one in a text; nothing is none."""
    if isinstance(value, str):
        value = decoded(value, "tools") if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(f"tools must be a list of objects; found {found(value)}")
    return tuple(value)


def decoded(value: str, where: str) -> Any:
    """JSON in a text."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"{where} is no JSON: {found(value)}") from None


def text(value: Any, name: str) -> str:
    """A JSON value as a text with something in it."""
    if not isinstance(value, str):
        raise DataError(f"{name} must be a text; found {found(value)}")
    if not value.strip():
        raise DataError(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{name} holds half a surrogate pair at character {error.start + 1}") from None
    return value


def found(value: Any) -> str:
    """A value as an error shows it."""
    if value is None:
        return "nothing"
    return f"{type(value).__name__} {str(value)[:40]!r}" if value != [] else "an empty list"


def listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
