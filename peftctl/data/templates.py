"""Which chat template a recipe asks for, one that ships with peftctl or a file, and a system prompt for it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from peftctl.composed import is_template_name, templates
from peftctl.errors import DataError

NEEDS = re.compile(r"\{#-? needs: (.*?) -?#\}")
LONGEST = 1 << 20  # bytes of a template


class Chosen(NamedTuple):
    """`name`: as errors show it. `shipped`: whether it is to open texts as the tokenizer does."""

    source: str
    name: str
    shipped: bool = False


def chosen(wanted: str) -> Chosen:
    """The template of `data.chat_template`: a name or a file. Raises DataError."""
    if is_template_name(wanted):
        return Chosen(templates()[wanted].read_text("utf-8"), f"the chat template {wanted}", shipped=True)
    path = Path(wanted)
    try:
        content = path.read_bytes()
        source = content.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"data.chat_template: {wanted} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"data.chat_template: {wanted} is no UTF-8 at byte {error.start + 1}") from None
    if len(content) > LONGEST or not source.strip():
        raise DataError(f"data.chat_template: {wanted} is {'empty' if not source.strip() else 'longer than 1 MiB'}")
    return Chosen(source, f"the chat template {path.name}")


def needs(source: str) -> tuple[str, ...]:
    """The tokens that a template is of no use without, and names of special ones, as its first comment says."""
    found = NEEDS.match(source)
    return tuple(found.group(1).split()) if found else ()


def with_system(source: str, system: str) -> str:
    """The template, which now begins dialogues without a system prompt with this one.

    It is part of the template, so that whoever uses the adapter with it gives the model what it was trained with.
    """
    message = f"{{'role': 'system', 'content': {json.dumps(system, ensure_ascii=False)}}}"
    opening = (
        "{%- if messages and messages[0]['role'] != 'system' -%}{%- set messages = ["
        f"{message}] + messages -%}}{{%- endif -%}}"
    )
    return source if source.startswith(opening) else opening + source
