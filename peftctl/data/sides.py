"""What an encoder-decoder learns from: a prompt for its encoder, an answer for its decoder, each framed by itself.

A row's ids are the prompt's, the token that a decoder begins with, and the answer's; labels are the answer's alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftctl.data.chat import CONFIG, Chat, Encoded
from peftctl.data.spans import Dialogue, Trained, shown, turns
from peftctl.errors import DataError
from peftctl.row import Message, Row


class Sides(Chat):
    """A `Chat` for an encoder-decoder. `start`: the id that its decoder begins with."""

    def __init__(self, start: int, *args: Any) -> None:
        """`args`: as for `Chat`."""
        super().__init__(*args)
        self.start = start

    def dialogue(
        self, messages: Sequence[Message], trained: Trained = "assistant", tools: Sequence[Any] = ()
    ) -> Encoded:
        """The last turn as the answer to the rendered turns before it. Raises DataError where others are learnt."""
        learnt, answer = turns(messages, trained), len(messages) - 1
        for index in learnt:
            if index != answer:
                raise DataError(
                    f"message {index + 1} would be learnt, but an encoder-decoder answers once, at the end; "
                    "objective.trained: last learns the last turn alone"
                )
        if dict(messages[answer].more).get("tool_calls"):
            raise DataError(f"message {answer + 1} calls tools, which is not served on encoder-decoders")
        before = Dialogue(self._templated(), messages[:answer], self.special, tools)
        prompt = before.rendered(prompt=True).text
        shown(before, before.rendered().text)
        return self._sides(self._ids(prompt), messages[answer].content, learnt[answer])

    def completion(self, prompt: str, answer: str) -> Encoded:
        """A plain prompt and its answer."""
        self._plain("a plain prompt")
        return self._sides(self.prompt(prompt), answer)

    def text(self, text: str) -> Encoded:
        raise DataError("raw text has no prompt for an encoder to read; give prompt and completion")

    def prompt(self, text: str) -> tuple[int, ...]:
        """Ids of a plain prompt, with all that the tokenizer puts around a text."""
        return self.encode(text)

    def fingerprint(self) -> str:
        return f"{super().fingerprint()} {self.start}"

    def sided(self, row: Row) -> Row:
        """An encoded row, told where the decoder's part begins. DataError where nothing is before that."""
        first = next((k for k, weight in enumerate(row.weights) if weight), 0)
        if first < 2 or row.ids[first - 1] != self.start:
            raise DataError("no token of the prompt is left for the encoder to read")
        return row._replace(source=first - 1)

    def _sides(self, source: Sequence[int], answer: str, weight: float = 1.0) -> Encoded:
        if self.eos is None:
            raise DataError(f"the tokenizer {self.folder} has no eos_token, so no answer can end; set it in {CONFIG}")
        target = self.encode(answer)
        target = target if target[-1:] == (self.eos,) else (*target, self.eos)
        before = (*source, self.start)
        return (*before, *target), (0.0,) * len(before) + (weight,) * len(target)


def chat_of(start: int | None, *args: Any) -> Chat:
    """The tokenizer of an encoder-decoder whose decoder begins with `start`, or of a decoder alone (None)."""
    return Chat(*args) if start is None else Sides(start, *args)
