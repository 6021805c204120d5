"""Which characters of a rendered dialogue are learnt: the trained answers, each with the token that ends its turn.

A turn begins where the prompt for it ends. Its end is found by rendering the turn with a probe as its content: what
the template writes after the probe is the closing, and the closing's first special token ends the turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from peftctl.data.template import Rendered, Template
from peftctl.errors import DataError
from peftctl.row import Message

PROBE = Message("assistant", "peftctlprobe")
Span = tuple[int, int]


class Closing(NamedTuple):
    """What a template writes after a turn's content, and how much of it the model must write itself."""

    text: str
    learnt: int


def learnt(
    template: Template, messages: Sequence[Message], trained: str, special: re.Pattern[str]
) -> tuple[str, tuple[Span, ...]]:
    """The rendered dialogue and the spans of its characters that are labels, in order.

    `trained`: `assistant` (every turn of its) or `last` (the last). `special` matches the tokenizer's special tokens.
    Raises DataError where the template does not render, or where its renderings of the dialogue's beginnings disagree.
    """
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if not turns:
        raise DataError("no assistant turn; there is nothing to learn from")
    full = template.render(messages)
    turns = turns[-1:] if trained == "last" else turns
    if full.marks:
        return full.text, _marked(template, full, messages, turns, special)
    return full.text, tuple(_turn(template, full.text, messages, index, special) for index in turns)


def ending(template: Template, special: re.Pattern[str]) -> str:
    """The special token that ends a turn after a plain question; empty when the template ends turns without one."""
    found = special.search(_closing(template, [Message("user", "a")], special).text)
    return found.group() if found else ""


def _turn(template: Template, full: str, messages: Sequence[Message], index: int, special: re.Pattern[str]) -> Span:
    head = template.render(messages[:index], prompt=True).text
    upto = full if index == len(messages) - 1 else template.render(messages[: index + 1]).text
    closing = _closing(template, messages[:index], special)
    stop = len(upto) - len(closing.text) + closing.learnt
    if not (upto.startswith(head) and upto.endswith(closing.text) and len(head) < stop):
        raise DataError(_disagree(template, index, "the prompt for it is not how it begins"))
    if not full.startswith(upto[:stop]):
        raise DataError(
            _disagree(template, index, "it changes when more turns follow") + "; set objective.trained: last"
        )
    return len(head), stop


def _marked(
    template: Template, full: Rendered, messages: Sequence[Message], turns: Sequence[int], special: re.Pattern[str]
) -> tuple[Span, ...]:
    """The template's own marks, from the first trained turn on, each with the end-of-turn token at its end."""
    closing, outside = _marked_closing(template, messages[: turns[-1]], special)
    # a template without marks for what comes before (no assistant turn yet) renders none
    earlier = len(template.render(messages[: turns[0]]).marks) if turns[0] else 0
    spans = tuple(_closed(full.text, mark, closing, outside) for mark in full.marks[earlier:])
    if not any(start < stop for start, stop in spans):
        raise DataError(f"{template.name} marks nothing of this dialogue's answers with generation")
    return spans


def _closed(text: str, mark: Span, closing: Closing, outside: str) -> Span:
    start, stop = mark
    if not text[start:stop].endswith(closing.text):
        return mark
    if outside:
        return start, stop + len(outside) if text.startswith(outside, stop) else stop
    return start, stop - len(closing.text) + closing.learnt


def _marked_closing(template: Template, before: Sequence[Message], special: re.Pattern[str]) -> tuple[Closing, str]:
    """The closing inside the mark; and, when no token in it ends the turn, what follows outside up to that token."""
    probe = template.render([*before, PROBE])
    for start, stop in probe.marks:
        _, found, tail = probe.text[start:stop].rpartition(PROBE.content)
        if found:
            closing = _learnt(tail, special)
            after = special.search(probe.text, stop)
            inside = special.search(tail) is not None
            return closing, "" if inside or after is None else probe.text[stop : after.end()]
    return Closing("", 0), ""


def _closing(template: Template, before: Sequence[Message], special: re.Pattern[str]) -> Closing:
    _, found, tail = template.render([*before, PROBE]).text.rpartition(PROBE.content)
    if not found:
        raise DataError(f"{template.name} leaves out what the assistant says; give a template that shows it")
    return _learnt(tail, special)


def _learnt(tail: str, special: re.Pattern[str]) -> Closing:
    # without a special token, white space may be all that ends a turn, so it is learnt whole
    first = special.search(tail)
    return Closing(tail, first.end() if first else len(tail))


def _disagree(template: Template, index: int, why: str) -> str:
    return f"{template.name} renders message {index + 1} inconsistently, so its tokens cannot be told apart: {why}"
