"""Recognising what the rows of a file are, by their columns, and turning each into an `Example`, or saying why not.

messages: `messages`, a list of {role, content}. completion: `prompt` and `completion`, texts. preference: `chosen` and
`rejected`, texts or messages, after `prompt` (text or messages) or after what both begin with. unpaired: `label`, true
or false, of an answer: the `completion` of a `prompt`, or the last of `messages`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from peftctl.data.sources import Cells, Fault, Json, Source, spelled
from peftctl.errors import DataError, suggest
from peftctl.row import Example, Message

ROLES = ("system", "user", "assistant")
NEEDED: dict[str, tuple[tuple[str, ...], ...]] = {  # of each kind, one of these sets of columns
    "messages": (("messages",),),
    "completion": (("prompt", "completion"),),
    "preference": (("chosen", "rejected"),),
    "unpaired": (("prompt", "completion", "label"), ("messages", "label")),
}
USED = {**NEEDED, "preference": (("prompt", "chosen", "rejected"),)}
COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected", "label")
DESCRIBED = {
    "messages": "messages",
    "completion": "prompts with completions (prompt, completion)",
    "preference": "preference pairs (prompt, chosen, rejected)",
    "unpaired": "single judged answers (prompt, completion, label; or messages, label)",
}


class Recognised(NamedTuple):
    kind: str
    examples: list[Example]
    faults: list[Fault]
    unused: tuple[str, ...]  # columns of the file that nothing reads


class Columns(NamedTuple):
    """What the rows of a file are, and where its columns have other names (ours: the file's)."""

    kind: str
    names: Mapping[str, str]

    def example(self, row: Json, place: str = "") -> Example:
        """One row as an example. Raises DataError with the reason alone."""
        renamed = _renamed(row, self.names)
        return example(spelled(renamed, self.kind) if isinstance(row, Cells) else renamed, self.kind, place)

    def unused(self, found: Collection[str]) -> tuple[str, ...]:
        """The columns that nothing reads."""
        read = {self.names.get(name, name) for name in chain.from_iterable(USED[self.kind])}
        return tuple(name for name in found if name not in read)


def recognise(
    source: Source,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    wanted: Collection[str] = tuple(NEEDED),
) -> Recognised:
    """The rows of a source as examples of one kind; rows that are not of it become faults.

    `columns` maps our name of a column to the file's ({"completion": "answer"}). `wanted`: the kinds that decide where
    the columns fit several. Raises DataError when they fit none, or several all the same and `format` is auto, and for
    a column map that does not fit the file.
    """
    found = list(dict.fromkeys(key for _, row in source.rows for key in row))
    decided = decide(source.name, found, format, columns, wanted)
    examples: list[Example] = []
    faults: list[Fault] = []
    for place, row in source.rows:
        try:
            examples.append(decided.example(row, place))
        except DataError as error:
            faults.append(Fault(place, str(error)))
    return Recognised(decided.kind, examples, faults, decided.unused(found))


def decide(
    file: str,
    found: Sequence[str],
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    wanted: Collection[str] = tuple(NEEDED),
) -> Columns:
    """What rows with the columns `found` are (none: no row could be read); otherwise as `recognise`."""
    names = dict(columns or {})
    _check_names(file, names, found)
    ours = [*names, *(name for name in found if name not in names and name not in names.values())]
    return Columns(_kind(file, ours, found, wanted) if format == "auto" else _named(file, format, ours, found), names)


def example(row: Json, kind: str, place: str = "") -> Example:
    """One row, under our column names, as an example of that kind. Raises DataError with the reason alone."""
    row = {name: value for name, value in row.items() if value is not None}  # tables pad missing values with null
    for name in _missing(kind, row):
        raise DataError(f"no {name!r}; a row of {DESCRIBED[kind]} needs it; it has {_listed(row)}")
    return PARSERS[kind](row)._replace(place=place)


def _missing(kind: str, names: Collection[str]) -> list[str]:
    """The columns of a kind that are not there: of its sets, those of the one that lacks least."""
    lacking = [[name for name in needed if name not in names] for needed in NEEDED[kind]]
    return min(lacking, key=len)


def _renamed(row: Json, names: Mapping[str, str]) -> Json:
    taken = set(names.values())
    kept = {name: value for name, value in row.items() if name not in names and name not in taken}
    return kept | {ours: row[theirs] for ours, theirs in names.items() if theirs in row}


def _check_names(file: str, names: Mapping[str, str], found: Sequence[str]) -> None:
    for ours, theirs in names.items():
        if ours not in COLUMNS:
            raise DataError(
                f"data.columns: {ours!r} is no column that is read{suggest(ours, COLUMNS)}; "
                f"write our name first, then the file's; ours are {', '.join(COLUMNS)}"
            )
        if found and theirs not in found:
            raise DataError(
                f"data.columns.{ours}: {file} has no column {theirs!r}{suggest(theirs, found)}; it has {_listed(found)}"
            )


def _kind(file: str, ours: Sequence[str], found: Sequence[str], wanted: Collection[str]) -> str:
    fitting = [kind for kind in NEEDED if not _missing(kind, ours)]
    kinds = [kind for kind in fitting if kind in wanted] or fitting
    if len(kinds) == 1:
        return kinds[0]
    if kinds:
        raise DataError(
            f"{file} could be {' or '.join(kinds)} by its columns {_listed(found)}; say which with data.format"
        )
    if not found:
        return "messages"  # no row at all could be read: the faults tell more than the columns
    raise DataError(f"{file} has the columns {_listed(found)}; {_known()}; rename with data.columns")


def _named(file: str, format: str, ours: Sequence[str], found: Sequence[str]) -> str:
    if format not in NEEDED:
        raise DataError(f"data.format: {format!r} is not known{suggest(format, NEEDED)}; auto, {', '.join(NEEDED)} are")
    missing = _missing(format, ours)
    if missing and found:
        raise DataError(
            f"{file}: data.format is {format}, but there is no column {' and no column '.join(missing)}; "
            f"it has {_listed(found)}; rename with data.columns"
        )
    return format


def _known() -> str:
    sets = {kind: ", or ".join(" + ".join(columns) for columns in several) for kind, several in USED.items()}
    return "known are " + "; ".join(f"{kind}: {columns}" for kind, columns in sets.items())


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _messages(row: Json) -> Example:
    messages = dialogue(row["messages"], "messages")
    if not any(message.role == "assistant" for message in messages):
        raise DataError("no assistant turn in messages; there is nothing to learn from")
    return Example("messages", "", messages=messages)


def _completion(row: Json) -> Example:
    prompt, completion = (text(row[name], name) for name in ("prompt", "completion"))
    return Example("completion", "", prompt_text=prompt, completion=completion)


def _preference(row: Json) -> Example:
    if row["chosen"] == row["rejected"]:
        raise DataError("chosen equals rejected; a pair must differ")
    kinds = {isinstance(row[name], str) for name in ("chosen", "rejected")}
    if len(kinds) == 2:
        raise DataError("of chosen and rejected one is a text and the other is not; both must be of one form")
    return _texts(row) if kinds == {True} else _dialogues(row)


def _texts(row: Json) -> Example:
    """A pair of plain answers: after a plain prompt they stay plain, after messages they are the assistant's turns."""
    chosen, rejected = (text(row[name], name) for name in ("chosen", "rejected"))
    if "prompt" not in row:
        return _parted(chosen, rejected)
    if isinstance(row["prompt"], str):
        prompt = text(row["prompt"], "prompt")
        return Example("preference", "", prompt_text=prompt, chosen=chosen, rejected=rejected)
    answers = [(Message("assistant", answer),) for answer in (chosen, rejected)]
    return Example("preference", "", dialogue(row["prompt"], "prompt"), chosen=answers[0], rejected=answers[1])


def _parted(chosen: str, rejected: str) -> Example:
    """Two texts without a prompt of their own: it is what they begin with, up to the last white space of that."""
    prompt = chosen[: _common(chosen, rejected)]
    while prompt and not (prompt[-1].isspace() and prompt.strip()):
        prompt = prompt[:-1]
    prompt = prompt.rstrip()  # white space belongs to the word after it, as tokenizers have it
    answers = chosen[len(prompt) :], rejected[len(prompt) :]
    if not prompt:
        raise DataError("no 'prompt', and chosen and rejected have no common prompt: they differ from their first word")
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if not answer.strip():
            raise DataError(f"{name} is empty after what it shares with the other text")
    return Example("preference", "", prompt_text=prompt, chosen=answers[0], rejected=answers[1])


def _dialogues(row: Json) -> Example:
    chosen, rejected = (dialogue(row[name], name) for name in ("chosen", "rejected"))
    common = _common(chosen, rejected)
    prompt = _prompt(row.get("prompt"), chosen[:common])
    answers = chosen[common:], rejected[common:]
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if [message.role for message in answer] != ["assistant"]:
            raise DataError(
                f"{name} has {len(answer)} messages after what it shares with the other answer "
                f"({_listed(m.role for m in answer)}); exactly one assistant message is learnt from"
            )
    return Example("preference", "", prompt, chosen=answers[0], rejected=answers[1])


def _prompt(given: Any, shared: tuple[Message, ...]) -> tuple[Message, ...]:
    """The prompt of two dialogues, from its own column or from what they share; both must agree."""
    if given is None:
        if not shared:
            raise DataError("no common prompt: chosen and rejected differ from their first message on")
        return shared
    if isinstance(given, str):
        message = Message("user", text(given, "prompt"))
        if shared and message not in shared:
            raise DataError("the prompt is not among the messages that chosen and rejected begin with")
        return shared or (message,)
    messages = dialogue(given, "prompt")
    if shared and shared != messages:
        raise DataError("chosen and rejected begin with other messages than the prompt has")
    return messages


def _unpaired(row: Json) -> Example:
    label = row["label"]
    if not isinstance(label, bool):
        raise DataError(f"label must be true (a desirable answer) or false; found {_found(label)}")
    if "messages" not in row:
        return _answered(row)._replace(label=label)
    if "prompt" in row or "completion" in row:
        raise DataError("the answer stands in messages and in prompt or completion; one of them is meant")
    messages = dialogue(row["messages"], "messages")
    if messages[-1].role != "assistant":
        raise DataError(f"the label judges the last message, which is the {messages[-1].role}'s, not the assistant's")
    return Example("unpaired", "", messages, label=label)


def _answered(row: Json) -> Example:
    """A prompt and its answer: plain after a plain prompt, the assistant's turn after messages."""
    given = row["completion"]
    if isinstance(row["prompt"], str):
        prompt, completion = text(row["prompt"], "prompt"), text(given, "completion")
        return Example("unpaired", "", prompt_text=prompt, completion=completion)
    prompt_messages = dialogue(row["prompt"], "prompt")
    if isinstance(given, str):
        return Example("unpaired", "", (*prompt_messages, Message("assistant", text(given, "completion"))))
    answer = dialogue(given, "completion")
    if [message.role for message in answer] != ["assistant"]:
        raise DataError(f"completion has {_listed(m.role for m in answer)}; exactly one assistant message is judged")
    return Example("unpaired", "", (*prompt_messages, *answer))


def _common(a: Sequence[object], b: Sequence[object]) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (left, right) in enumerate(pairs) if left != right), min(len(a), len(b)))


PARSERS: dict[str, Callable[[Json], Example]] = {
    "messages": _messages,
    "completion": _completion,
    "preference": _preference,
    "unpaired": _unpaired,
}


def dialogue(value: Any, name: str) -> tuple[Message, ...]:
    """A JSON value as messages. Raises DataError naming the first wrong one, counted from 1."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{name} must be a list of messages {{role, content}}; found {_found(value)}")
    return tuple(_message(item, f"{name}, message {number}") for number, item in enumerate(value, start=1))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"{where} must be an object {{role, content}}; found {_found(value)}")
    role = value.get("role")
    if role not in ROLES:
        near = suggest(role, ROLES) if isinstance(role, str) else ""
        raise DataError(f"{where} has the role {role!r}{near}; known are {', '.join(ROLES)}")
    extra = [key for key, item in value.items() if key not in ("role", "content") and item is not None]
    if extra:
        raise DataError(f"{where} has {_listed(map(repr, extra))}; a message has role and content and nothing else")
    return Message(role, text(value.get("content"), f"{where} ({role}): content"))


def text(value: Any, name: str) -> str:
    """A JSON value as a text with something in it. Raises DataError."""
    if not isinstance(value, str):
        raise DataError(f"{name} must be a text; found {_found(value)}")
    if not value.strip():
        raise DataError(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{name} holds half a surrogate pair at character {error.start + 1}") from None
    return value


def _found(value: Any) -> str:
    if value is None:
        return "nothing"
    return f"{type(value).__name__} {str(value)[:40]!r}" if value != [] else "an empty list"
