"""A row: one sequence of token ids with a weight for each token as a label. Torch-free; what data and objectives share.

`batch.py` turns the rows of a micro-batch into a forest.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One path of a micro-batch. `weights[i]` is what predicting `ids[i]` counts; 0 where it is no label."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    example: int = 0  # index of the example it comes from; a pair's two rows share it
    role: str = ""  # "", "chosen", "rejected", "desirable", "undesirable", "mismatched"


class Message(NamedTuple):
    role: str
    content: str


class Example(NamedTuple):
    """One example of a data file, recognised. What is not of its kind is empty.

    `messages`: messages. `completion`: prompt_text + completion. `preference`: messages as the prompt, and the two
    answers, each one or more messages (or, with prompt_text, plain texts). `unpaired`: as messages that end with an
    answer, or as completion, and whether the answer is a desirable one.
    """

    kind: str  # "messages", "completion", "preference", "unpaired"
    place: str  # file:line, for errors
    messages: tuple[Message, ...] = ()
    prompt_text: str = ""
    completion: str = ""
    chosen: tuple[Message, ...] | str = ()
    rejected: tuple[Message, ...] | str = ()
    label: bool = False
