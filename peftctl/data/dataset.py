"""From a source to encoded examples: every row is kept, or refused with its place and the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from peftctl.data import cache, preflight
from peftctl.data.cache import Made
from peftctl.data.encoded import Dataset, Report
from peftctl.data.encoding import COUNTED, SHOWN, Given, Job, Tokenizer, Written
from peftctl.data.formats import DESCRIBED
from peftctl.data.mixing import Wanted, held_out, joined, summed, wanted
from peftctl.data.order import PAIRED, order
from peftctl.data.packed import Packed
from peftctl.data.parallel import chunks
from peftctl.data.reading import HEAD, Reading
from peftctl.data.sources import Fault, Part, files, fingerprint, place, shown
from peftctl.data.sources.hub import Hub
from peftctl.data.stream import Stream
from peftctl.errors import DataError
from peftctl.objectives.base import Objective

__all__ = ["Prepared", "Tokenizer", "load", "prepare"]

Progress = Callable[[str, int, int | None], None]  # a source's name, rows done, rows in all if that can be guessed


class Prepared(NamedTuple):
    """The report is on all of `data.train`, before the split; the second on that of `data.validation`."""

    train: Dataset
    validation: Dataset | None
    report: Report
    validation_report: Report | None
    repeated: int  # training examples that stood before
    leaked: int  # held-out examples that are trained on as well
    stream: Stream | None = None  # what is trained on in place of `train`, which are then its first rows

    @property
    def warnings(self) -> list[str]:
        """What is likely to be a mistake; each a sentence."""
        held = self.validation_report
        more = [] if held is None else [f"{held.name}: {text}" for text in preflight.warnings(held)]
        return preflight.warnings(self.report, self.repeated, self.leaked) + more

    def notes(self) -> list[str]:
        """What a run tells before it begins."""
        reports = [report for report in (self.report, self.validation_report) if report is not None]
        return [*map(preflight.summary, reports), *(f"warning: {text}" for text in self.warnings)]

    def document(self) -> dict[str, Any]:
        """What `validate` answers, of the source that is trained on; that which is held out stands under its name."""
        held = self.validation_report
        return {
            **preflight.document(self.report),
            "train_examples": len(self.train),
            "validation_examples": len(self.validation) if self.validation is not None else 0,
            "repeated": self.repeated,
            "leaked": self.leaked,
            "warnings": self.warnings,
            "validation": None if held is None else preflight.document(held),
        }


def silent(name: str, done: int, total: int | None) -> None:
    """No progress is shown."""


def prepare(
    recipe: Any,
    chat: Tokenizer,
    objective: Objective[Any],
    vocabulary: int | None = None,
    progress: Progress = silent,
) -> Prepared:
    """The training and held-out examples of a recipe (`data`, `objective` and `train.seed` are read).

    `vocabulary`: rows of the base's embedding. Raises DataError; all that is wrong with a source's rows in one go.
    """
    data, seed = recipe.data, recipe.train.seed

    def every(sources: Sequence[Wanted], limit: int | None) -> tuple[list[Dataset], Report]:
        found = [
            load(
                one.place,
                chat,
                objective,
                recipe.objective,
                format=one.format or data.format,
                columns=data.columns if one.columns is None else one.columns,
                max_length=data.max_length,
                truncate=data.truncate,
                on_bad_row=data.on_bad_row,
                limit=one.limit or limit,
                vocabulary=vocabulary,
                progress=progress,
            )
            for one in sources
        ]
        datasets, reports = [dataset for dataset, _ in found], [report for _, report in found]
        return datasets, reports[0] if len(reports) == 1 else summed(reports, datasets)

    held: list[Dataset] = []
    held_report: Report | None = None
    if data.streaming:
        sample, report, stream = _streamed(recipe, chat, objective, vocabulary)
        if data.validation is not None:
            held, held_report = every(wanted(data.validation), None)
        beside = joined(held) if held else None
        return Prepared(sample, beside, report, held_report, *preflight.overlap(sample, beside), stream)
    sources = wanted(data.train)
    trained, report = every(sources, data.limit)
    if isinstance(data.validation, float):
        trained, held = held_out(trained, data.validation, seed, pieces=data.truncate == "split")
    elif data.validation is not None:
        held, held_report = every(wanted(data.validation), None)
    train = joined(trained, [one.weight for one in sources])
    validation = joined(held) if held else None
    repeated, leaked = preflight.overlap(train, validation)
    train = _paired(train, objective, seed, "training")
    if validation is not None:
        validation = _paired(validation, objective, seed, "held-out")
    return Prepared(train, validation, report, held_report, repeated, leaked)


def load(
    source: str | Path | Hub,
    chat: Tokenizer,
    objective: Objective[Any],
    config: Any,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    max_length: int = 1024,
    truncate: str = "refuse",
    on_bad_row: str = "error",
    limit: int | None = None,
    vocabulary: int | None = None,
    progress: Progress = silent,
) -> tuple[Dataset, Report]:
    """The examples of a source, encoded by the objective under its `config`; of a large one, once (see `cache`).

    Raises DataError for a source of a kind that the objective does not learn from, for one of which no row can be
    used, and, unless `on_bad_row` is `skip`, for any row that cannot be used.
    """
    parts, name = _parts(source), _name(source)
    options = (format, columns, max_length, truncate, on_bad_row, limit, vocabulary)
    key = cache.key(parts, chat.fingerprint, objective, config, options)
    return cache.kept(key, lambda write: _encoded(name, parts, chat, objective, config, *options, write, progress))


def _encoded(
    name: str,
    parts: Sequence[Part],
    chat: Tokenizer,
    objective: Objective[Any],
    config: Any,
    format: str,
    columns: Mapping[str, str] | None,
    max_length: int,
    truncate: str,
    on_bad_row: str,
    limit: int | None,
    vocabulary: int | None,
    write: Callable[[bytes], Any],
    progress: Progress,
) -> Made:
    reading = Reading(name, parts, limit)
    head = reading.head()
    job = _job(name, head, chat, objective, config, format, columns, max_length, truncate, vocabulary)
    packed, report = _gathered(job, reading, head, on_bad_row, write, progress)
    return Made(packed, report, tuple(part.stem for part in parts), fingerprint(parts))


def _job(
    name: str,
    head: Sequence[Given],
    chat: Tokenizer,
    objective: Objective[Any],
    config: Any,
    format: str,
    columns: Mapping[str, str] | None,
    max_length: int,
    truncate: str,
    vocabulary: int | None,
) -> Job:
    """What encodes the rows of a source, by what its first rows are. Raises DataError."""
    seen = dict.fromkeys(column for _, row in head if isinstance(row, dict) for column in row)
    written = Written(name, tuple(seen), format, columns, objective.kinds)
    decided = written.decide()
    if seen and decided.format.kind not in objective.kinds:
        wanted = " or ".join(DESCRIBED[kind] for kind in sorted(objective.kinds))
        raise DataError(f"{name} has {decided.format.described}; objective {objective.name} learns from {wanted}")
    if truncate == "split" and decided.format.kind != "text":
        raise DataError(f"{name} has {decided.format.described}; data.truncate: split is for raw text")
    return Job(chat, objective, config, written, decided, max_length, vocabulary, truncate)


def _gathered(
    job: Job,
    reading: Reading,
    head: Sequence[Given],
    on_bad_row: str,
    write: Callable[[bytes], Any],
    progress: Progress,
) -> tuple[Packed, Report]:
    """All rows encoded, their bytes written, and the report on them. Raises DataError."""
    name, seen = reading.name, dict.fromkeys(job.written.seen)
    packed, faults, counts, reach = Packed(), list[tuple[int, str]](), Counter[str](), 0
    for chunk in chunks(job, reading.batches(head), reading.long):
        packed.extend(chunk.packed)
        write(chunk.content)
        faults += chunk.faults[: SHOWN - len(faults)]
        reach = max(reach, chunk.counts["reach"])
        counts.update(chunk.counts)
        seen |= dict.fromkeys(chunk.columns)
        progress(name, counts["read"], reading.expected())
    stems = [part.stem for part in reading.parts]
    listed = tuple(Fault(place(stems, code), reason) for code, reason in faults)
    if counts["refused"] and (on_bad_row != "skip" or counts["refused"] == counts["read"]):
        raise DataError(_refusal(name, listed, counts["refused"], counts["read"], on_bad_row))
    figures: dict[str, Any] = preflight.lengths(packed.tokens)._asdict() | {key: counts[key] for key in COUNTED}
    report = Report(
        name=name,
        format=job.columns.format.name,
        kind=job.columns.format.kind,
        read=counts["read"],
        kept=counts["read"] - counts["refused"],
        refused=counts["refused"],
        faults=listed,
        reach=reach,
        unused=job.columns.unused(tuple(seen)),
        **figures,
    )
    return packed, report


def _streamed(
    recipe: Any, chat: Tokenizer, objective: Objective[Any], vocabulary: int | None
) -> tuple[Dataset, Report, Stream]:
    """The first rows, checked as all are elsewhere, and what reads the rest while training goes on."""
    data, sources = recipe.data, wanted(recipe.data.train)
    parts = [part for source in sources for part in _parts(source.place)]
    name = ", ".join(_name(source.place) for source in sources)
    format, columns = sources[0].format or data.format, sources[0].columns or data.columns
    reading = Reading(name, parts, HEAD)
    head, content = reading.head(), bytearray()
    config = recipe.objective
    job = _job(name, head, chat, objective, config, format, columns, data.max_length, data.truncate, vocabulary)
    packed, report = _gathered(job, reading, head, data.on_bad_row, content.extend, silent)
    stream = Stream(name, parts, job, recipe.train.seed, data.shuffle_buffer, data.on_bad_row == "skip")
    made = Made(packed, report, tuple(part.stem for part in parts), stream.fingerprint)
    return made.loaded(lambda start, end: bytes(memoryview(content)[start:end]))[0], report, stream


def _parts(source: str | Path | Hub) -> Sequence[Part]:
    return [source] if isinstance(source, Hub) else files(source)


def _name(source: str | Path | Hub) -> str:
    return source.shown if isinstance(source, Hub) else shown(Path(source))


def _paired(dataset: Dataset, objective: Objective[Any], seed: int, part: str) -> Dataset:
    """The examples with what they get of each other, where the objective has such rows."""
    if objective.pair is None:
        return dataset
    try:
        examples = objective.pair(dataset.examples, order(len(dataset), seed, PAIRED))
    except DataError as error:
        raise DataError(f"{dataset.name}, its {part} rows: {error}") from None
    return replace(dataset, examples=examples)


def _refusal(name: str, faults: Sequence[Fault], refused: int, total: int, on_bad_row: str) -> str:
    lines = [str(fault) for fault in faults]
    if refused > SHOWN:
        lines.append(f"... and {refused - SHOWN} more")
    if refused == total:
        lines.append(f"{name}: no row can be used")
    elif on_bad_row != "skip":
        lines.append(f"{name}: {refused} of {total} rows cannot be used; data.on_bad_row: skip leaves them out")
    return "\n".join(lines)
