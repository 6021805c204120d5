"""From a source to encoded examples: every row is kept, or refused with its place and the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from peftctl.data import cache, preflight
from peftctl.data.cache import Made
from peftctl.data.encoded import Dataset, Report
from peftctl.data.encoding import Tokenizer
from peftctl.data.gathering import Progress, gathered, job_for, silent
from peftctl.data.mixing import Wanted, every_size, held_out, joined, summed, wanted
from peftctl.data.order import PAIRED, order
from peftctl.data.reading import Reading
from peftctl.data.sources import Part, fingerprint
from peftctl.data.sources.hub import Hub
from peftctl.data.stream import Stream
from peftctl.data.streamed import name_of, parts_of, streamed, whole
from peftctl.errors import DataError
from peftctl.objectives.base import Objective

__all__ = ["Prepared", "Tokenizer", "load", "prepare"]


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
            "train_examples": len(self.train) if self.stream is None else self.report.kept - len(self.stream.held),
            "validation_examples": len(self.validation) if self.validation is not None else 0,
            "repeated": self.repeated,
            "leaked": self.leaked,
            "warnings": self.warnings,
            "validation": None if held is None else preflight.document(held),
        }


def prepare(
    recipe: Any,
    chat: Tokenizer,
    objective: Objective[Any],
    vocabulary: int | None = None,
    progress: Progress = silent,
    every_row: bool = False,
) -> Prepared:
    """The training and held-out examples of a recipe (`data`, `objective` and `train.seed` are read).

    `vocabulary`: rows of the base's embedding. `every_row`: whether rows that are streamed are all read once for the
    report, and not their first ones alone. Raises DataError; all that is wrong with a source's rows in one go.
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
        return datasets, reports[0] if len(reports) == 1 else summed(reports, every_size(datasets))

    sources, share = wanted(data.train), data.validation if isinstance(data.validation, float) else None
    trained: list[Dataset] = []
    held: list[Dataset] = []
    held_report: Report | None = None
    found = streamed(recipe, sources, chat, objective, vocabulary, progress) if data.streaming else None
    if found is not None:
        trained, held, report = found.samples, found.held, found.report
    else:
        trained, report = every(sources, data.limit)
        if share is not None:
            trained, held = held_out(trained, share, seed, pieces=data.truncate == "split")
    if data.validation is not None and share is None:
        held, held_report = every(wanted(data.validation), None)
    train = joined(trained, [one.weight for one in sources] if found is None else ())
    validation = joined(held) if held else None
    repeated, leaked = preflight.overlap(train, validation)
    if found is not None and every_row:
        report, leaked = whole(found, validation, data.on_bad_row, progress)
    train = _paired(train, objective, seed, "training")
    if validation is not None:
        validation = _paired(validation, objective, seed, "held-out")
    stream = found.stream if found is not None else None
    return Prepared(train, validation, report, held_report, repeated, leaked, stream)


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
    parts, name = parts_of(source), name_of(source)
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
    job = job_for(name, head, chat, objective, config, format, columns, max_length, truncate, vocabulary)
    packed, report = gathered(job, reading, head, on_bad_row, write, progress)
    return Made(packed, report, tuple(part.stem for part in parts), fingerprint(parts))


def _paired(dataset: Dataset, objective: Objective[Any], seed: int, part: str) -> Dataset:
    """The examples with what they get of each other, where the objective has such rows."""
    if objective.pair is None:
        return dataset
    try:
        examples = objective.pair(dataset.examples, order(len(dataset), seed, PAIRED))
    except DataError as error:
        raise DataError(f"{dataset.name}, its {part} rows: {error}") from None
    return replace(dataset, examples=examples)
