"""Several sources as one data set, and how many examples of each an epoch has."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from peftctl.data.encoded import Dataset, Examples, Lazy, Origin, Report, listed, numbered
from peftctl.data.encoding import COUNTED, SHOWN
from peftctl.data.order import Mix, dealt, split
from peftctl.data.preflight import lengths
from peftctl.data.sources.hub import Hub
from peftctl.errors import DataError
from peftctl.row import Row


class Wanted(NamedTuple):
    """One source that a recipe asks for; None: as `data` has it."""

    path: str | None = None
    hub: str | None = None
    split: str | None = None
    config: str | None = None
    revision: str | None = None
    weight: float | None = None
    format: str | None = None
    columns: dict[str, str] | None = None
    limit: int | None = None

    @property
    def place(self) -> str | Hub:
        """What is read."""
        if self.path is not None:
            return self.path
        assert self.hub is not None
        return Hub(self.hub, self.split or "train", self.config, self.revision)


def wanted(value: Any) -> list[Wanted]:
    """The sources that a key of a recipe names."""
    entries = value if isinstance(value, list) else [value]
    return [Wanted(one) if isinstance(one, str) else Wanted(**dict(one)) for one in entries]


def held_out(
    datasets: Sequence[Dataset], share: float, seed: int, pieces: bool = False
) -> tuple[list[Dataset], list[Dataset]]:
    """Of each data set what stays and what is held out; one of a single row stays whole. Raises DataError.

    `pieces`: whether a row may have become several examples.
    """
    if all(len(data) < 2 for data in datasets):
        name = ", ".join(data.name for data in datasets)
        rows = "one row" if len(datasets) == 1 else "one row each"
        raise DataError(f"{name} has {rows}, of which none can be held out; set data.validation to null")
    kept, out = list[Dataset](), list[Dataset]()
    for data in datasets:
        stays, goes = _sides(data, share, seed, pieces) if len(data) > 1 else ([0], [])
        kept.append(data.subset(stays))
        if goes:
            out.append(data.subset(goes))
    return kept, out


def joined(datasets: Sequence[Dataset], weights: Sequence[float | None] = ()) -> Dataset:
    """One after the other; `weights`, where given, decide how many examples of each an epoch has. Raises DataError."""
    if len(datasets) == 1:
        return datasets[0]
    sizes = [len(data) for data in datasets]
    ends = array("L", accumulate(sizes))
    own = [listed(data.examples) for data in datasets]

    def at(index: int) -> tuple[int, int]:
        part = bisect_right(ends, index)
        return part, index - (ends[part] - sizes[part])

    def rows(index: int) -> tuple[Row, ...]:
        part, inside = at(index)
        return numbered(own[part][inside], index)

    def sizes_of(index: int) -> Sequence[int]:
        part, inside = at(index)
        return own[part].lengths(inside)

    def digest(index: int) -> int:
        part, inside = at(index)
        return own[part].digest(inside)

    def place(index: int) -> str:
        part, inside = at(index)
        return datasets[part].places[inside]

    mix = _mix(datasets, weights)
    counts = mix.counts if mix is not None else sizes
    origins = [Origin(data.name, data.fingerprint, len(data), n) for data, n in zip(datasets, counts, strict=True)]
    return Dataset(
        name=", ".join(data.name for data in datasets),
        examples=Examples(ends[-1], rows, sizes_of, digest),
        places=Lazy(ends[-1], place),
        fingerprint=hashlib.sha256("".join(data.fingerprint for data in datasets).encode()).hexdigest(),
        origins=tuple(origins),
        mix=mix,
    )


def every_size(datasets: Sequence[Dataset]) -> Iterator[int]:
    """The tokens of each sequence."""
    examples = [listed(data.examples) for data in datasets]
    return (size for own in examples for index in range(len(own)) for size in own.lengths(index))


def summed(reports: Sequence[Report], sizes: Iterable[int]) -> Report:
    """The reports on several sources as one; `sizes`: the tokens of each sequence."""
    numbers = ("read", "kept", "refused", *COUNTED)
    figures: dict[str, Any] = lengths(sizes)._asdict() | {n: sum(getattr(r, n) for r in reports) for n in numbers}
    return Report(
        name=", ".join(report.name for report in reports),
        format=", ".join(dict.fromkeys(report.format for report in reports)),
        kind=", ".join(dict.fromkeys(report.kind for report in reports)),
        faults=tuple(fault for report in reports for fault in report.faults)[:SHOWN],
        reach=max(report.reach for report in reports),
        unused=tuple(dict.fromkeys(name for report in reports for name in report.unused)),
        **figures,
    )


def _mix(datasets: Sequence[Dataset], weights: Sequence[float | None]) -> Mix | None:
    """An epoch has as many examples as there are rows, dealt out by weight."""
    given = [weight for weight in weights if weight is not None]
    if not given:
        return None
    sizes = tuple(len(data) for data in datasets)
    counts = dealt(given, sum(sizes))
    for data, count, weight in zip(datasets, counts, given, strict=True):
        if not count:
            raise DataError(f"{data.name}: weight {weight:g} gives it none of the {sum(sizes)} examples of an epoch")
    return Mix(sizes, tuple(counts))


def _sides(data: Dataset, share: float, seed: int, pieces: bool) -> tuple[Sequence[int], Sequence[int]]:
    """Examples to train on and to hold out. Pieces of one text stay on one side, unless it is the only one."""
    rows = list(dict.fromkeys(data.places)) if pieces else []
    if len(rows) < 2:
        return split(len(data), share, seed)
    held = {rows[number] for number in split(len(rows), share, seed)[1]}
    sides: tuple[list[int], list[int]] = ([], [])
    for index, row in enumerate(data.places):
        sides[row in held].append(index)
    return sides
