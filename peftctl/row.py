"""A row: one sequence of token ids with a weight for each token as a label. Torch-free; what data and objectives share.

`batch.py` turns the rows of a micro-batch into a forest.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Row(NamedTuple):
    """One path of a micro-batch. `weights[i]` is what predicting `ids[i]` counts; 0 where it is no label.

    A row for a task's head has `targets`, as many as tokens: what is to be answered *at* token i counts `weights[i]`
    and is `targets[i]`, a label's index or a number. What is said of the whole row stands at its last token.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    example: int = 0  # index of the example it comes from; a pair's two rows share it
    role: str = ""  # "", "chosen", "rejected", "desirable", "undesirable", "mismatched"
    targets: tuple[float, ...] = ()
    types: tuple[int, ...] = ()  # which of a pair's texts each token belongs to, where an encoder is told
    source: int = 0  # of an encoder-decoder: its first tokens, as many, are the encoder's, the others its decoder's
    extra: Mapping[str, Any] = NOTHING  # what else its objective must know of it, as plain JSON

    def __hash__(self) -> int:
        return hash((self.ids, self.role, self.source))  # `extra` has no hash of its own before Python 3.12

    @property
    def reach(self) -> int:
        """How many positions it takes up; of an encoder-decoder, on the longer side."""
        return max(self.source, len(self.ids) - self.source)

    def part(self, start: int, end: int) -> Row:
        """Some of its tokens."""
        cut = {name: getattr(self, name)[start:end] for name in ("ids", "weights", "targets", "types")}
        return self._replace(**cut)


def judged(ids: tuple[int, ...], target: float = 0, **more: Any) -> Row:
    """A row of which one thing is to be said as a whole."""
    before = len(ids) - 1
    return Row(ids, (*(0.0,) * before, 1.0), targets=(*(0,) * before, target), **more)


class Message(NamedTuple):
    """One turn. `weight`: what its labels count, where the row itself says so (0: it is not learnt); else None.

    `more`: what else a chat template is shown of it (tool_calls, name, ...), by name.
    """

    role: str
    content: str
    weight: float | None = None
    more: tuple[tuple[str, Any], ...] = ()

    def document(self) -> dict[str, Any]:
        """As a chat template sees it: keys that are not given are not there."""
        return {"role": self.role, "content": self.content, **dict(self.more)}


class Example(NamedTuple):
    """One example of a data file, recognised. What is not of its kind is empty.

    `messages`: messages. `completion`: prompt_text + completion; or messages, of which those of the prompt have the
    weight 0. `text`: completion alone. `preference`: messages as the prompt, and the two answers, each one or more
    messages (or, with prompt_text, plain texts). `unpaired`: as messages that end with an answer, or as completion,
    and whether the answer is a desirable one. `prompt`: messages or prompt_text, and perhaps as completion the answer
    that would be right. `labelled`: one or two texts and an answer, a label or a number as text. `tagged`: words and as
    many answers, "" for none.
    """

    kind: str  # "messages", "completion", "text", "preference", "unpaired", "prompt", "labelled", "tagged"
    place: str  # file:line, for errors
    messages: tuple[Message, ...] = ()
    prompt_text: str = ""
    completion: str = ""
    chosen: tuple[Message, ...] | str = ()
    rejected: tuple[Message, ...] | str = ()
    label: bool = False
    texts: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    tools: tuple[Any, ...] = ()  # what the assistant may call, as a chat template is shown it


# how rows may be written, by the name that data.format gives it, and the kind of example that each becomes
FORMATS = {
    "messages": "messages",
    "sharegpt": "messages",
    "alpaca": "messages",
    "completion": "completion",
    "text": "text",
    "preference": "preference",
    "unpaired": "unpaired",
    "prompt": "prompt",
    "labelled": "labelled",
    "tagged": "tagged",
}
