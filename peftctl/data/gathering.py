"""What becomes of all rows of a source, counted as they come: which are kept, which are refused and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peftctl.data import preflight
from peftctl.data.encoded import Report
from peftctl.data.encoding import COUNTED, SHOWN, Chunk, Given, Job, Tokenizer, Written
from peftctl.data.formats import DESCRIBED
from peftctl.data.packed import Packed
from peftctl.data.parallel import chunks
from peftctl.data.reading import Reading
from peftctl.data.sources import Fault, place
from peftctl.errors import DataError
from peftctl.objectives.base import Objective

Progress = Callable[[str, int, int | None], None]  # a source's name, rows done, rows in all if that can be guessed


def silent(name: str, done: int, total: int | None) -> None:
    """No progress is shown."""


def job_for(
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


def gathered(
    job: Job,
    reading: Reading,
    head: Sequence[Given],
    on_bad_row: str,
    write: Callable[[bytes], Any],
    progress: Progress,
) -> tuple[Packed, Report]:
    """All rows encoded, their bytes written, and the report on them. Raises DataError."""
    packed, tally = Packed(), Tally(job)
    for chunk in chunks(job, reading.batches(head), reading.long):
        packed.extend(chunk.packed)
        write(chunk.content)
        tally.add(chunk)
        progress(reading.name, tally.counts["read"], reading.expected())
    return packed, tally.report(reading, on_bad_row)


class Tally:
    """Figures of chunks, in memory that does not grow with them; `sizes`: how many sequences have so many tokens."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.faults: list[tuple[int, str]] = []
        self.counts: Counter[str] = Counter()
        self.sizes: Counter[int] = Counter()
        self.reach = 0
        self.seen = dict.fromkeys(job.written.seen)

    def add(self, chunk: Chunk) -> None:
        self.faults += chunk.faults[: SHOWN - len(self.faults)]
        self.reach = max(self.reach, chunk.counts["reach"])
        self.counts.update(chunk.counts)
        self.sizes.update(chunk.packed.tokens)
        self.seen |= dict.fromkeys(chunk.columns)

    def report(self, reading: Reading, on_bad_row: str) -> Report:
        """The report on what came. Raises DataError where no row can be used, or one cannot that is not skipped."""
        name, stems, counts = reading.name, [part.stem for part in reading.parts], self.counts
        listed = tuple(Fault(place(stems, code), reason) for code, reason in self.faults)
        if counts["refused"] and (on_bad_row != "skip" or counts["refused"] == counts["read"]):
            raise DataError(_refusal(name, listed, counts["refused"], counts["read"], on_bad_row))
        figures: dict[str, Any] = preflight.lengths(self.sizes)._asdict() | {key: counts[key] for key in COUNTED}
        return Report(
            name=name,
            format=self.job.columns.format.name,
            kind=self.job.columns.format.kind,
            read=counts["read"],
            kept=counts["read"] - counts["refused"],
            refused=counts["refused"],
            faults=listed,
            reach=self.reach,
            unused=self.job.columns.unused(tuple(self.seen)),
            **figures,
        )


def _refusal(name: str, faults: Sequence[Fault], refused: int, total: int, on_bad_row: str) -> str:
    lines = [str(fault) for fault in faults]
    if refused > SHOWN:
        lines.append(f"... and {refused - SHOWN} more")
    if refused == total:
        lines.append(f"{name}: no row can be used")
    elif on_bad_row != "skip":
        lines.append(f"{name}: {refused} of {total} rows cannot be used; data.on_bad_row: skip leaves them out")
    return "\n".join(lines)
