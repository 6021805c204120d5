"""Labelled tokens as text: what is learnt stands in double brackets."""

from __future__ import annotations

from collections.abc import Iterator

from peftctl.data.chat import Chat, Encoded


def labelled(chat: Chat, encoded: Encoded) -> str:
    """The text with what is learnt in double brackets, where it counts other than 1 with its weight before a bar."""
    return "".join(f"[[{_bar(weight)}{text}]]" if weight else text for text, weight in _runs(chat, encoded))


def spans(chat: Chat, encoded: Encoded) -> list[str]:
    """What is learnt, run by run; brackets in it are its own."""
    return [_bar(weight) + text for text, weight in _runs(chat, encoded) if weight]


def _bar(weight: float) -> str:
    return "" if weight == 1 else f"{weight:g}|"


def _runs(chat: Chat, encoded: Encoded) -> Iterator[tuple[str, float]]:
    """The text of neighbouring tokens of one weight, and that weight."""
    ids, weights = encoded
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or weights[end] != weights[start]:
            yield chat.decode(ids[start:end], special=True), weights[start]
            start = end
