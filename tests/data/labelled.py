"""Labelled tokens as text: what is learnt stands in double brackets."""

from __future__ import annotations

from peftctl.data.chat import Chat, Encoded


def labelled(chat: Chat, encoded: Encoded) -> str:
    """The text with what is learnt in double brackets, where it counts other than 1 with its weight before a bar."""
    parts, ids, weights = [], *encoded
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or weights[end] != weights[start]:
            text = chat.decode(ids[start:end], special=True)
            weight = "" if weights[start] == 1 else f"{weights[start]:g}|"
            parts.append(f"[[{weight}{text}]]" if weights[start] else text)
            start = end
    return "".join(parts)


def spans(chat: Chat, encoded: Encoded) -> list[str]:
    """What is learnt, run by run."""
    return [part.split("]]")[0] for part in labelled(chat, encoded).split("[[")[1:]]
