"""A chat template: Jinja in a sandbox, its output bounded, with the parts between `generation` marks located.

What a template sees and how white space is cut is as in transformers, so that both render the same text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.utils import Namespace

from peftctl.data.sandbox import LONGEST, Sandbox
from peftctl.errors import DataError
from peftctl.row import Message

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters: Unicode promises that no text holds them


class Rendered(NamedTuple):
    """A rendered dialogue, and the spans of characters that the template itself marks as the model's."""

    text: str
    marks: tuple[tuple[int, int], ...]


class Template:
    """A compiled chat template. Raises DataError where it does not compile, and where it does not render."""

    def __init__(self, source: str, tokens: Mapping[str, str], name: str, now: datetime | None = None) -> None:
        """`tokens`: special tokens by their names (bos_token, ...). `now`: what `strftime_now` tells."""
        self.source = source
        self.name = name
        # one moment for a whole run: a dialogue must not render differently after midnight
        self.now = now or datetime.now()
        self.tokens = dict(tokens)
        self.environment = _environment(self.now)
        try:
            self.compiled = self.environment.from_string(source)
        except (TemplateError, SyntaxError, RecursionError, MemoryError) as error:
            line = getattr(error, "lineno", None)
            raise DataError(f"{name} does not compile: {error}{f' (line {line})' if line else ''}") from None

    def render(self, messages: Sequence[Message], prompt: bool = False, tools: Sequence[Any] = ()) -> Rendered:
        """The dialogue as text; with `prompt`, followed by what opens the assistant's next turn.

        `tools`: what the assistant may call, as JSON values.
        """
        documents = [message.document() for message in messages]
        if any(mark in text for text in _texts(messages, tools) for mark in (OPEN, CLOSE)):
            raise DataError("a message holds U+FDD0 or U+FDD1, which are no characters")
        return _locate("".join(self._pieces(documents, prompt, list(tools) or None)))

    def _pieces(self, messages: list[dict[str, Any]], prompt: bool, tools: list[Any] | None) -> list[str]:
        pieces: list[str] = []
        length = 0
        values = {**self.tokens, "messages": messages, "tools": tools, "documents": None}
        self.environment.begin()
        try:
            for piece in self.compiled.generate(**values, add_generation_prompt=prompt):
                pieces.append(piece)
                length += len(piece)
                if length > LONGEST:
                    raise DataError(f"{self.name} renders more than {LONGEST:,} characters for one dialogue")
        except DataError:
            raise
        except Refused as error:
            raise DataError(f"{self.name} refuses this dialogue: {error}") from None
        except Exception as error:  # a template is a stranger's program: it can fail in any way
            raise DataError(f"{self.name} fails on this dialogue: {type(error).__name__}: {error}") from None
        return pieces


class Refused(TemplateError):
    """A template's own `raise_exception`."""


class Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: prints what is inside, between two marks."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        before, after = (nodes.Output([nodes.TemplateData(mark)]) for mark in (OPEN, CLOSE))
        return nodes.Scope([before, *body, after]).set_lineno(line)


class Guarded(Namespace):
    """A namespace that stores no underscored names, which Python could take for its own."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a chat template may not store {name!r}")
        super().__setitem__(name, value)


def _environment(now: datetime) -> Sandbox:
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = environment.guarded("tojson", _tojson)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": now.strftime, "namespace": Guarded}
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise Refused(message)


def _texts(messages: Sequence[Message], tools: Sequence[Any]) -> Iterator[str]:
    """All that a template may print of a dialogue."""
    yield from (message.content for message in messages)
    more = [message.more for message in messages if message.more]
    if more or tools:
        yield json.dumps([more, list(tools)], ensure_ascii=False)


def _locate(marked: str) -> Rendered:
    """The text without marks, and where they were."""
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    length = 0
    for number, part in enumerate(marked.split(OPEN)):
        inside, closed, rest = part.partition(CLOSE)
        if number and closed:
            spans.append((length, length + len(inside)))
        parts += (inside, rest)
        length += len(inside) + len(rest)
    return Rendered("".join(parts), tuple(spans))
