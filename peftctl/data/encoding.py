"""From rows to encoded examples, some rows at a time: each is kept, or refused with the reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from peftctl import objectives
from peftctl.data.chat import Chat
from peftctl.data.formats import Columns, decide
from peftctl.data.packed import Packed, tables_of
from peftctl.data.sides import Sides, chat_of
from peftctl.data.sources import Cells, Json
from peftctl.data.templates import Chosen
from peftctl.data.truncation import fitted, with_room
from peftctl.errors import DataError, NoLabel
from peftctl.objectives.base import Encoder, Objective
from peftctl.row import Example, Row

SHOWN = 10  # faults that a report lists
# of a report's figures, those that chunks add up to
COUNTED = (
    *("sequences", "tokens", "labelled_tokens", "unlabelled", "answers", "ended"),
    *("truncated", "bos_doubled", "bos_missing"),
)
LENGTH = 8  # bytes of a number that tells a length

Given = tuple[int, Json | str]  # a place, as a number; and a row, or why it is none


class Tokenizer(Encoder, Protocol):
    """What is asked of a `Chat` here."""

    def token(self, index: int) -> str: ...

    def fingerprint(self) -> str: ...

    @property
    def bos(self) -> int | None: ...

    @property
    def opening(self) -> tuple[int, ...]: ...

    @property
    def eos_ids(self) -> tuple[int, ...]: ...


class Written(NamedTuple):
    """How the rows of a source are written: what they are decided to be, by columns that were seen."""

    name: str
    seen: tuple[str, ...]
    format: str
    columns: Mapping[str, str] | None
    wanted: Collection[str]

    def decide(self) -> Columns:
        """Raises DataError where they are no rows that are known."""
        return decide(self.name, self.seen, self.format, self.columns, self.wanted)


class Job(NamedTuple):
    """What turns rows into encoded examples."""

    chat: Tokenizer
    objective: Objective[Any]
    config: Any
    written: Written
    columns: Columns
    max_length: int
    vocabulary: int | None
    truncate: str = "refuse"

    def document(self) -> dict[str, Any] | None:
        """What another process needs to do the same; None where only this one can."""
        chat = self.chat
        if not isinstance(chat, Chat) or objectives.get(self.objective.name) is not self.objective:
            return None
        template = chat.template
        told = (template.source, template.name, template.now.isoformat()) if template is not None else None
        return {
            "chat": (chat.start if isinstance(chat, Sides) else None, str(chat.folder), chat.system, told),
            "objective": self.config.model_dump(mode="json"),
            "written": self.written._replace(wanted=sorted(self.written.wanted)),
            "limits": (self.max_length, self.vocabulary, self.truncate),
        }


def job_of(document: Mapping[str, Any]) -> Job:
    """The job of a document."""
    start, folder, system, told = document["chat"]
    source, name, now = told or (None, "", None)
    chosen = Chosen(source, name) if source is not None else None
    chat = chat_of(start, folder, chosen, datetime.fromisoformat(now) if now else None, system)
    objective = objectives.get(document["objective"]["name"])
    written = Written(*document["written"])
    config = objective.config.model_validate(document["objective"])
    return Job(chat, objective, config, written, written.decide(), *document["limits"])


class Chunk(NamedTuple):
    """What became of some rows. `faults`: the first of them, by place; `counts`: see `Report`."""

    packed: Packed
    content: bytes
    faults: list[tuple[int, str]]
    counts: dict[str, int]
    columns: list[str]

    def dump(self) -> bytes:
        tables = [table.tobytes() for table in self.packed.tables]
        head = json.dumps([self.packed.roles, list(map(len, tables)), self.faults, self.counts, self.columns]).encode()
        return b"".join((len(head).to_bytes(LENGTH, "little"), head, *tables, self.content))


def chunk_of(data: bytes) -> Chunk:
    """The chunk that was dumped."""
    at = LENGTH + int.from_bytes(data[:LENGTH], "little")
    roles, lengths, faults, counts, columns = json.loads(data[LENGTH:at])

    def read(size: int) -> bytes:
        nonlocal at
        at += size
        return data[at - size : at]

    packed = Packed(roles, tables_of(lengths, read))
    return Chunk(packed, data[at:], [(place, reason) for place, reason in faults], counts, columns)


def encode(job: Job, given: Sequence[Given]) -> Chunk:
    """The rows that can be used, encoded by the objective, and what is wrong with the others."""
    packed, contents, room = Packed(), list[bytes](), job.objective.room(job.config)
    faults: list[tuple[int, str]] = []
    opening = job.chat.opening
    counts: Counter[str] = Counter(dict.fromkeys(("read", "refused", "unlabelled", "truncated", "reach"), 0))
    for place, row in given:
        counts["read"] += 1
        try:
            found, size = pieces(job, row)
        except DataError as error:
            counts["refused"] += 1
            counts["unlabelled"] += isinstance(error, NoLabel)
            faults.append((place, str(error)))
            continue
        counts["truncated"] += size + room > job.max_length
        counts["bos_missing"] += sum(own.ids[: len(opening)] != opening for own in found[0])
        for rows in found:
            contents.append(packed.add(rows, place))
            counts.update(_counts(rows, job.chat))
            counts["reach"] = max(counts["reach"], *(own.reach + room for own in rows))
    columns = dict.fromkeys(name for _, row in given if isinstance(row, dict) for name in row)
    return Chunk(packed, b"".join(contents), faults[:SHOWN], dict(counts), list(columns))


def pieces(job: Job, row: Json | str) -> tuple[list[tuple[Row, ...]], int]:
    """The examples of a row of the source, of which one that is split has several; and its size before."""
    if isinstance(row, str):
        raise DataError(row)
    rows = encoded(job.columns.example(row), job.chat, job.objective, job.config, job.vocabulary)
    room, size = job.objective.room(job.config), max(len(own.ids) for own in rows)
    if room:
        return [with_room(rows, room, job.max_length, job.truncate, job.chat.opening)], size
    pieces = fitted(rows, job.max_length, job.truncate, job.chat.opening)
    if isinstance(job.chat, Sides):
        pieces = [tuple(map(job.chat.sided, own)) for own in pieces]
    return pieces, size


def encoded(
    example: Example, chat: Tokenizer, objective: Objective[Any], config: Any, vocabulary: int | None
) -> tuple[Row, ...]:
    """The rows of an example, whole. Raises DataError with the reason alone."""
    rows, asked = objective.encode(example, chat, config), objective.room(config) > 0
    for row in rows:
        which = f"the {row.role} answer's row" if row.role else "the row"
        # nothing predicts the first token; and a prompt, which is to be answered, has no label yet
        if not asked and not any(row.weights if row.targets else row.weights[1:]):
            raise NoLabel(f"no token of {which} would be learnt")
        if vocabulary is not None and max(row.ids) >= vocabulary:
            worst = max(row.ids)
            raise DataError(
                f"the tokenizer gives id {worst} ({chat.token(worst)!r}), but the base knows ids below {vocabulary}; "
                "base and tokenizer do not belong together"
            )
    return rows


def _counts(rows: Sequence[Row], chat: Tokenizer) -> dict[str, int]:
    labels = [[index for index, weight in zip(row.ids[1:], row.weights[1:], strict=True) if weight] for row in rows]
    return {
        "sequences": len(rows),
        "tokens": sum(len(row.ids) for row in rows),
        "labelled_tokens": sum(map(len, labels)),
        "answers": sum(not row.targets for row in rows),
        "ended": sum(own[-1] in chat.eos_ids for row, own in zip(rows, labels, strict=True) if own and not row.targets),
        "bos_doubled": sum(row.ids[:2] == (chat.bos, chat.bos) for row in rows),
    }


def message(given: Sequence[Given]) -> bytes:
    """Rows for another process, as a line."""
    return json.dumps([(place, row, isinstance(row, Cells)) for place, row in given]).encode() + b"\n"


def given_of(line: bytes) -> list[Given]:
    """The rows of a message."""
    return [(place, Cells(row) if cells else row) for place, row, cells in json.loads(line)]
