"""Labelled texts (`text`, perhaps `text_pair`, and `label`) and labelled words (`tokens` and `tags`)."""

from __future__ import annotations

from typing import Any

from peftctl.data.formats import values
from peftctl.data.formats.format import Format
from peftctl.data.sources import Json
from peftctl.errors import DataError
from peftctl.row import Example


def _labelled(row: Json) -> Example:
    texts = tuple(values.text(row[name], name) for name in ("text", "text_pair") if name in row)
    return Example("labelled", "", texts=texts, answers=(_answer(row["label"], "label"),))


def _tagged(row: Json) -> Example:
    """A tag of null is none: its word is read, and nothing is learnt at it."""
    for name in ("tokens", "tags"):
        if not isinstance(row[name], list) or not row[name]:
            raise DataError(f"{name} must be a list with something in it; found {values.found(row[name])}")
    if len(row["tokens"]) != len(row["tags"]):
        raise DataError(f"there are {len(row['tokens'])} tokens and {len(row['tags'])} tags; each token has one")
    words = tuple(values.text(word, f"token {number}") for number, word in enumerate(row["tokens"], 1))
    tags = tuple("" if tag is None else _answer(tag, f"tag {number}") for number, tag in enumerate(row["tags"], 1))
    return Example("tagged", "", texts=words, answers=tags)


def _answer(value: Any, name: str) -> str:
    """A label or a number, as text: what it means is the objective's to say."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else values.text(value, name)


FORMATS = (
    Format(
        "labelled", (("text", "label"),), "labelled texts (text, perhaps text_pair, label)", _labelled, ("text_pair",)
    ),
    Format("tagged", (("tokens", "tags"),), "labelled words (tokens, tags)", _tagged),
)
