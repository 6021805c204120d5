"""Single answers, judged by `label`, true or false: the `completion` of a `prompt`, or the last of `messages`."""

from __future__ import annotations

from peftctl.data.formats import values
from peftctl.data.formats.format import Format
from peftctl.data.sources import Json
from peftctl.errors import DataError
from peftctl.row import Example, Message


def _unpaired(row: Json) -> Example:
    label = row["label"]
    if not isinstance(label, bool):
        raise DataError(f"label must be true (a desirable answer) or false; found {values.found(label)}")
    if "messages" not in row:
        return _answered(row)._replace(label=label)
    if "prompt" in row or "completion" in row:
        raise DataError("the answer stands in messages and in prompt or completion; one of them is meant")
    messages = values.dialogue(row["messages"], "messages")
    if messages[-1].role != "assistant":
        raise DataError(f"the label judges the last message, which is the {messages[-1].role}'s, not the assistant's")
    return Example("unpaired", "", messages, label=label)


def _answered(row: Json) -> Example:
    """A prompt and its answer: plain after a plain prompt, the assistant's turn after messages."""
    given = row["completion"]
    if isinstance(row["prompt"], str):
        prompt, completion = values.text(row["prompt"], "prompt"), values.text(given, "completion")
        return Example("unpaired", "", prompt_text=prompt, completion=completion)
    prompt_messages = values.dialogue(row["prompt"], "prompt")
    if isinstance(given, str):
        return Example("unpaired", "", (*prompt_messages, Message("assistant", values.text(given, "completion"))))
    answer = values.dialogue(given, "completion")
    if [message.role for message in answer] != ["assistant"]:
        raise DataError(
            f"completion has {values.listed(m.role for m in answer)}; exactly one assistant message is judged"
        )
    return Example("unpaired", "", (*prompt_messages, *answer))


FORMATS = (
    Format(
        "unpaired",
        (("prompt", "completion", "label"), ("messages", "label")),
        "single judged answers (prompt, completion, label; or messages, label)",
        _unpaired,
        ("tools",),
    ),
)
