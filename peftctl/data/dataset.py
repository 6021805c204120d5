"""From a file to encoded examples: every row is kept, or refused with its place and the reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from peftctl.data import cache
from peftctl.data.encoded import Dataset, Report
from peftctl.data.formats import DESCRIBED, recognise
from peftctl.data.order import PAIRED, order, split
from peftctl.data.sources import Fault, read
from peftctl.errors import DataError
from peftctl.objectives.base import Encoder, Objective
from peftctl.row import Example, Row

SHOWN = 10  # faults that a report lists


class Tokenizer(Encoder, Protocol):
    """What is asked of a `Chat` here."""

    def token(self, index: int) -> str: ...

    def fingerprint(self) -> str: ...

    @property
    def eos_ids(self) -> tuple[int, ...]: ...


class Prepared(NamedTuple):
    """The report is on the file of `data.train`, before the split; the second on that of `data.validation`."""

    train: Dataset
    validation: Dataset | None
    report: Report
    validation_report: Report | None


class NoLabel(DataError):
    """An example of which nothing would be learnt."""


def prepare(recipe: Any, chat: Tokenizer, objective: Objective[Any], vocabulary: int | None = None) -> Prepared:
    """The training and held-out examples of a recipe (`data`, `objective` and `train.seed` are read).

    `vocabulary`: rows of the base's embedding. Raises DataError; all that is wrong with a file's rows in one go.
    """
    data = recipe.data
    options = {
        "format": data.format,
        "columns": data.columns,
        "max_length": data.max_length,
        "on_bad_row": data.on_bad_row,
        "vocabulary": vocabulary,
    }
    train, report = load(data.train, chat, objective, recipe.objective, limit=data.limit, **options)
    held: Dataset | None = None
    held_report: Report | None = None
    if isinstance(data.validation, str):
        held, held_report = load(data.validation, chat, objective, recipe.objective, **options)
    elif data.validation is not None:
        if len(train) < 2:
            raise DataError(f"{train.name} has one row, of which none can be held out; set data.validation to null")
        kept, out = split(len(train), data.validation, recipe.train.seed)
        train, held = train.subset(kept), train.subset(out)
    train = _paired(train, objective, recipe.train.seed, "training")
    if held is not None:
        held = _paired(held, objective, recipe.train.seed, "held-out")
    return Prepared(train, held, report, held_report)


def load(
    path: str | Path,
    chat: Tokenizer,
    objective: Objective[Any],
    config: Any,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    max_length: int = 1024,
    on_bad_row: str = "error",
    limit: int | None = None,
    vocabulary: int | None = None,
) -> tuple[Dataset, Report]:
    """The examples of one file, encoded by the objective under its `config`; of a large file, once (see `cache`).

    Raises DataError for a file of a kind that the objective does not learn from, for one of which no row can be used,
    and, unless `on_bad_row` is `skip`, for any row that cannot be used.
    """
    options = (format, columns, max_length, on_bad_row, limit, vocabulary)
    key = cache.key(path, chat.fingerprint, objective, config, options)
    return cache.kept(key, lambda: _encoded(path, chat, objective, config, *options))


def _encoded(
    path: str | Path,
    chat: Tokenizer,
    objective: Objective[Any],
    config: Any,
    format: str,
    columns: Mapping[str, str] | None,
    max_length: int,
    on_bad_row: str,
    limit: int | None,
    vocabulary: int | None,
) -> tuple[Dataset, Report]:
    source = read(path, limit)
    found = recognise(source, format, columns, objective.kinds)
    if found.examples and found.kind not in objective.kinds:
        wanted = " or ".join(DESCRIBED[kind] for kind in sorted(objective.kinds))
        raise DataError(f"{source.name} has {found.format.described}; objective {objective.name} learns from {wanted}")
    faults = [*source.faults, *found.faults]
    kept: list[tuple[Example, tuple[Row, ...]]] = []
    unlabelled = 0
    for example in found.examples:
        try:
            kept.append((example, _encode(example, chat, objective, config, max_length, vocabulary)))
        except DataError as error:
            faults.append(Fault(example.place, str(error)))
            unlabelled += isinstance(error, NoLabel)
    total = len(source.rows) + len(source.faults)
    faults.sort(key=_place)
    if faults and (on_bad_row != "skip" or not kept):
        raise DataError(_refusal(source.name, faults, total, on_bad_row))
    rows = tuple(tuple(row._replace(example=i) for row in encoded) for i, (_, encoded) in enumerate(kept))
    dataset = Dataset(source.name, rows, tuple(example.place for example, _ in kept), source.fingerprint)
    report = Report(
        name=source.name,
        kind=found.kind,
        read=total,
        kept=len(kept),
        refused=len(faults),
        faults=tuple(faults[:SHOWN]),
        unlabelled=unlabelled,
        unused=found.unused,
        **_counts(dataset, chat.eos_ids),
    )
    return dataset, report


def _paired(dataset: Dataset, objective: Objective[Any], seed: int, part: str) -> Dataset:
    """The examples with what they get of each other, where the objective has such rows."""
    if objective.pair is None:
        return dataset
    try:
        examples = objective.pair(dataset.examples, order(len(dataset), seed, PAIRED))
    except DataError as error:
        raise DataError(f"{dataset.name}, its {part} rows: {error}") from None
    return replace(dataset, examples=examples)


def _encode(
    example: Example, chat: Tokenizer, objective: Objective[Any], config: Any, max_length: int, vocabulary: int | None
) -> tuple[Row, ...]:
    rows = objective.encode(example, chat, config)
    for row in rows:
        which = f"the {row.role} answer's row" if row.role else "the row"
        if not any(row.weights if row.targets else row.weights[1:]):  # nothing before the first token predicts it
            raise NoLabel(f"no token of {which} would be learnt")
        prompt = next(index for index, weight in enumerate((0.0, *row.weights[1:])) if weight or row.targets)
        if prompt >= max_length:
            raise DataError(
                f"the prompt alone has {prompt} tokens, and data.max_length {max_length} leaves no answer room"
            )
        if len(row.ids) > max_length:
            raise DataError(f"{which} has {len(row.ids)} tokens, more than data.max_length {max_length}")
        if vocabulary is not None and max(row.ids) >= vocabulary:
            worst = max(row.ids)
            raise DataError(
                f"the tokenizer gives id {worst} ({chat.token(worst)!r}), but the base knows ids below {vocabulary}; "
                "base and tokenizer do not belong together"
            )
    return rows


def _counts(dataset: Dataset, eos_ids: Sequence[int]) -> dict[str, int]:
    rows = list(chain.from_iterable(dataset.examples))
    labels = [[index for index, weight in zip(row.ids[1:], row.weights[1:], strict=True) if weight] for row in rows]
    return {
        "tokens": sum(len(row.ids) for row in rows),
        "labelled_tokens": sum(map(len, labels)),
        "ended": sum(label[-1] in eos_ids for label in labels),
        "longest": max(len(row.ids) for row in rows),
    }


def _place(fault: Fault) -> tuple[str, int]:
    name, _, line = fault.place.rpartition(":")
    return name, int(line.removeprefix("row "))


def _refusal(name: str, faults: Sequence[Fault], total: int, on_bad_row: str) -> str:
    lines = [str(fault) for fault in faults[:SHOWN]]
    if len(faults) > SHOWN:
        lines.append(f"... and {len(faults) - SHOWN} more")
    if len(faults) == total:
        lines.append(f"{name}: no row can be used")
    elif on_bad_row != "skip":
        lines.append(f"{name}: {len(faults)} of {total} rows cannot be used; data.on_bad_row: skip leaves them out")
    return "\n".join(lines)
