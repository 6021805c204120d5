"""Rows as the loss sees them: token by token, with what is learnt marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TextIO

from peftctl.row import Row

BROKEN = "\N{REPLACEMENT CHARACTER}"
SPELLED = str.maketrans({"\n": "\\n\n", "\t": "\\t", "\r": "\\r"})


class Decoder(Protocol):
    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of some ids; with `special`, special tokens are written out."""


def tokens(row: Row, chat: Decoder) -> Iterator[tuple[str, float]]:
    """Each token's text with what it counts as a label, 0 for none. Tokens that share a character come together."""
    labels = row.weights if row.targets else (0.0, *row.weights[1:])  # nothing predicts a first token
    pending: list[int] = []
    for index, (token, weight) in enumerate(zip(row.ids, labels, strict=True)):
        pending.append(token)
        text = chat.decode(pending, special=True)
        last = index + 1 == len(labels) or labels[index + 1] != weight
        if not text.endswith(BROKEN) or last or len(pending) > 8:
            yield text, weight
            pending = []


def plain(row: Row, chat: Decoder) -> str:
    """Where there is no colour: tokens between bars, what is learnt in double brackets (with its weight, if not 1)."""
    parts: list[str] = []
    before = 0.0
    for text, weight in tokens(row, chat):
        if weight != before:
            parts.append(("]]" if before else "") + _opened(weight))
        elif parts:
            parts.append("|")
        parts.append(text.translate(SPELLED))
        before = weight
    return "".join(parts) + ("]]" if before else "")


def _opened(weight: float) -> str:
    return "" if not weight else "[[" if weight == 1 else f"[[{weight:g}: "


def show(examples: Sequence[tuple[Row, ...]], places: Sequence[str], chat: Decoder, stream: TextIO) -> None:
    """Print examples with their places: in colour on a terminal, as `plain` elsewhere."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream, soft_wrap=True)
    for rows, place in zip(examples, places, strict=True):
        for row in rows:
            console.rule(" ".join(filter(None, (place, row.role, f"{len(row.ids)} tokens"))), style="dim")
            if console.color_system is None:
                console.print(plain(row, chat), markup=False, highlight=False)
                continue
            text = Text()
            for number, (token, weight) in enumerate(tokens(row, chat)):
                shade = "on grey19" if number % 2 else ""  # so that neighbours can be told apart
                text.append(token.translate(SPELLED), style=f"{'bold green' if weight else 'dim'} {shade}".strip())
            console.print(text)
