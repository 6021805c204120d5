"""Prompts to be answered: `prompt`, a text or messages, and `answer` where a right one is known."""

from __future__ import annotations

from peftctl.data.formats import values
from peftctl.data.formats.format import Format
from peftctl.data.sources import Json
from peftctl.errors import DataError
from peftctl.row import Example


def _asked(row: Json) -> Example:
    answer = values.text(row["answer"], "answer") if "answer" in row else ""
    if isinstance(row["prompt"], str):
        return Example("prompt", "", prompt_text=values.text(row["prompt"], "prompt"), completion=answer)
    messages = values.dialogue(row["prompt"], "prompt")
    if messages[-1].role == "assistant":
        raise DataError("prompt ends with the assistant's answer; it must end with what is to be answered")
    return Example("prompt", "", messages, completion=answer, tools=values.tools(row.get("tools")))


FORMATS = (Format("prompt", (("prompt",),), "prompts (prompt, perhaps answer)", _asked, ("answer", "tools")),)
