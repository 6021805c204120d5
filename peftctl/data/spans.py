"""Which characters of a rendered dialogue are learnt: the trained turns, each with the token that ends it.

A turn of the assistant begins where the prompt for it ends; another one where its content does. Its end is found by
rendering the turn with a probe as its content: what the template writes after the probe is the closing, and the
closing's first special token ends the turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from peftctl.data.template import Rendered, Template
from peftctl.errors import DataError, NoLabel
from peftctl.row import Message

PROBE = "peftctlprobe"
Trained = str | Sequence[str]


class Span(NamedTuple):
    """Characters of a rendered dialogue, and what each label that begins in them counts."""

    start: int
    stop: int
    weight: float = 1.0


class Closing(NamedTuple):
    """What a template writes after a turn's content, and how much of it the model must write itself."""

    text: str
    learnt: int


class Dialogue(NamedTuple):
    """A dialogue and how it is rendered. `special` matches the tokenizer's special tokens."""

    template: Template
    messages: Sequence[Message]
    special: re.Pattern[str]
    tools: Sequence[Any] = ()

    def rendered(self, upto: int | None = None, prompt: bool = False) -> Rendered:
        """The first messages, or all of them."""
        return self.template.render(self.messages[:upto], prompt, self.tools)

    def probed(self, index: int, role: str = "assistant") -> Rendered:
        """The messages before that one, and a probe in its place."""
        return self.template.render([*self.messages[:index], Message(role, PROBE)], tools=self.tools)


def learnt(dialogue: Dialogue, trained: Trained) -> tuple[str, tuple[Span, ...]]:
    """The rendered dialogue and the spans of its characters that are labels, in order.

    `trained`: `assistant` (every turn of its), `last` (the last), `all` (the whole text), or the roles whose turns are
    learnt. A message's own weight goes before that. Raises DataError where the template does not render, leaves out
    what is to be learnt, or where its renderings of the dialogue's beginnings disagree.
    """
    chosen = turns(dialogue.messages, trained)
    full = dialogue.rendered()
    shown(dialogue, full.text)
    if trained == "all":
        return full.text, (Span(0, len(full.text)),)
    spans: list[Span] = []
    for index, weight in chosen.items():
        if full.marks and dialogue.messages[index].role == "assistant":
            found = _marked(dialogue, full, index)
        else:
            found = [_turn(dialogue, full.text, index)]
        spans += [Span(start, stop, weight) for start, stop in found]
    return full.text, tuple(spans)


def ending(template: Template, special: re.Pattern[str]) -> str:
    """The special token that ends a turn after a plain question; empty when the template ends turns without one."""
    found = special.search(_closing(Dialogue(template, [Message("user", "a")], special), 1).text)
    return found.group() if found else ""


def turns(messages: Sequence[Message], trained: Trained) -> dict[int, float]:
    """The messages that are learnt, by their index, with what a label of theirs counts."""
    roles = ("assistant",) if isinstance(trained, str) else trained
    named = [index for index, message in enumerate(messages) if message.role in roles]
    if not named:
        raise NoLabel(f"no {' or '.join(roles)} turn; there is nothing to learn from")
    if trained == "all":
        weighed = [index for index, message in enumerate(messages, 1) if message.weight not in (None, 1.0)]
        if weighed:
            raise DataError(f"message {weighed[0]} has a weight of its own, but objective.trained: all learns it all")
    if trained == "last":
        named = named[-1:]
    own = {index: message.weight for index, message in enumerate(messages) if message.weight is not None}
    chosen = dict.fromkeys(named, 1.0) | {i: w for i, w in own.items() if trained != "last" or i in named}
    found = {index: chosen[index] for index in sorted(chosen) if chosen[index]}
    if not found:
        raise NoLabel("all that would be learnt has weight 0 (or train: false); there is nothing to learn from")
    return found


def shown(dialogue: Dialogue, full: str) -> None:
    """Tools and calls must be in the text: a template that does not know them leaves them out without a word."""
    template, messages, _, tools = dialogue
    if tools and template.render(messages).text == full:
        raise DataError(f"{template.name} leaves out the tools of this row; give a template that shows them")
    without = [message._replace(more=()) for message in messages]
    if any(dict(message.more).get("tool_calls") for message in messages):
        if template.render(without, tools=tools).text == full:
            raise DataError(f"{template.name} leaves out the tool calls of this row; give a template that shows them")


def _turn(dialogue: Dialogue, full: str, index: int) -> tuple[int, int]:
    message, messages = dialogue.messages[index], dialogue.messages
    opening, closing = _opening(dialogue, index), _closing(dialogue, index, message.role)
    upto = full if index == len(messages) - 1 else dialogue.rendered(index + 1).text
    if not upto.endswith(closing.text) and dict(message.more).get("tool_calls"):
        closing = _called(upto[len(opening) :], dialogue.special)  # some templates end a call by a token of its own
    stop = len(upto) - len(closing.text) + closing.learnt
    if not (upto.startswith(opening) and upto.endswith(closing.text) and len(opening) < stop):
        raise DataError(_disagree(dialogue, index, "the prompt for it is not how it begins"))
    if not full.startswith(upto[:stop]):
        why = "it changes when more turns follow"
        remedy = "learn the last turn alone (of dialogues: objective.trained: last; of pairs: let no other differ)"
        raise DataError(f"{_disagree(dialogue, index, why)}; {remedy}")
    return len(opening), stop


def _opening(dialogue: Dialogue, index: int) -> str:
    """All that stands before what a turn says."""
    role = dialogue.messages[index].role
    if role == "assistant":
        return dialogue.rendered(index, prompt=True).text
    return dialogue.probed(index, role).text.partition(PROBE)[0]


def _marked(dialogue: Dialogue, full: Rendered, index: int) -> list[tuple[int, int]]:
    """The template's own marks for a turn, each with the end-of-turn token at its end."""
    closing, outside = _marked_closing(dialogue, index)
    # a template without marks for what comes before (no assistant turn yet) renders none
    first = len(dialogue.rendered(index).marks) if index else 0
    following = (i for i, m in enumerate(dialogue.messages) if i > index and m.role == "assistant")
    after = next(following, None)
    last = len(full.marks) if after is None else len(dialogue.rendered(after).marks)
    spans = [_closed(full.text, mark, closing, outside) for mark in full.marks[first:last]]
    if not any(start < stop for start, stop in spans):
        raise DataError(f"{dialogue.template.name} marks nothing of message {index + 1} with generation")
    return spans


def _closed(text: str, mark: tuple[int, int], closing: Closing, outside: str) -> tuple[int, int]:
    start, stop = mark
    if not text[start:stop].endswith(closing.text):
        return mark
    if outside:
        return start, stop + len(outside) if text.startswith(outside, stop) else stop
    return start, stop - len(closing.text) + closing.learnt


def _marked_closing(dialogue: Dialogue, index: int) -> tuple[Closing, str]:
    """The closing inside the mark; and, when no token in it ends the turn, what follows outside up to that token."""
    probe, special = dialogue.probed(index), dialogue.special
    for start, stop in probe.marks:
        _, found, tail = probe.text[start:stop].rpartition(PROBE)
        if found:
            closing = _learnt(tail, special)
            after = special.search(probe.text, stop)
            inside = special.search(tail) is not None
            return closing, "" if inside or after is None else probe.text[stop : after.end()]
    return Closing("", 0), ""


def _closing(dialogue: Dialogue, index: int, role: str = "assistant") -> Closing:
    _, found, tail = dialogue.probed(index, role).text.rpartition(PROBE)
    if not found:
        raise DataError(f"{dialogue.template.name} leaves out what the {role} says; give a template that shows it")
    return _learnt(tail, dialogue.special)


def _learnt(tail: str, special: re.Pattern[str]) -> Closing:
    # without a special token, white space may be all that ends a turn, so it is learnt whole
    first = special.search(tail)
    return Closing(tail, first.end() if first else len(tail))


def _called(turn: str, special: re.Pattern[str]) -> Closing:
    """What ends a turn that calls tools: all after its last special token is no part of it."""
    last = 0
    for found in special.finditer(turn):
        last = found.end()
    return Closing(turn[last:], 0 if last else len(turn))


def _disagree(dialogue: Dialogue, index: int, why: str) -> str:
    where = f"{dialogue.template.name} renders message {index + 1} inconsistently"
    return f"{where}, so its tokens cannot be told apart: {why}"
