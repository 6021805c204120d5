"""Recognising how the rows of a file are written, by their columns, and turning each into an `Example`, or saying why
not. Each family of formats is a module here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from peftctl.data.formats import dialogues, judged, labelled, pairs, prompts, texts
from peftctl.data.formats.format import Format
from peftctl.data.formats.values import listed
from peftctl.data.sources import Cells, Fault, Json, Source, spelled
from peftctl.errors import DataError, suggest
from peftctl.row import Example

MODULES = (dialogues, texts, pairs, judged, prompts, labelled)
FORMATS: dict[str, Format] = {f.name: f for module in MODULES for f in module.FORMATS}
COLUMNS = tuple(dict.fromkeys(chain.from_iterable(f.read for f in FORMATS.values())))
DESCRIBED = {
    kind: " or ".join(f.described for f in FORMATS.values() if f.kind == kind)
    for kind in dict.fromkeys(f.kind for f in FORMATS.values())
}
# columns whose meaning is likely, though not certain: they are asked about
ASKED, ANSWERED = ("question", "query", "problem", "user"), ("answer", "response", "solution", "assistant")


class Recognised(NamedTuple):
    format: Format
    examples: list[Example]
    faults: list[Fault]
    unused: tuple[str, ...]  # columns of the file that nothing reads

    @property
    def kind(self) -> str:
        return self.format.kind


class Columns(NamedTuple):
    """How the rows of a file are written: their format, and where its columns have other names (ours: the file's)."""

    format: Format
    names: Mapping[str, str]

    def example(self, row: Json, place: str = "") -> Example:
        """One row as an example. Raises DataError with the reason alone."""
        renamed = _renamed(row, self.names)
        renamed = spelled(renamed, self.format.kind) if isinstance(row, Cells) else renamed
        return example(renamed, self.format.name, place)

    def unused(self, found: Collection[str]) -> tuple[str, ...]:
        """The columns that nothing reads."""
        read = {self.names.get(name, name) for name in self.format.read}
        return tuple(name for name in found if name not in read)


def recognise(
    source: Source,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    wanted: Collection[str] = tuple(DESCRIBED),
) -> Recognised:
    """The rows of a source as examples of one kind; rows that are not of it become faults. Otherwise as `decide`."""
    found = list(dict.fromkeys(key for _, row in source.rows for key in row))
    decided = decide(source.name, found, format, columns, wanted)
    examples: list[Example] = []
    faults: list[Fault] = []
    for place, row in source.rows:
        try:
            examples.append(decided.example(row, place))
        except DataError as error:
            faults.append(Fault(place, str(error)))
    return Recognised(decided.format, examples, faults, decided.unused(found))


def decide(
    file: str,
    found: Sequence[str],
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    wanted: Collection[str] = tuple(DESCRIBED),
) -> Columns:
    """The format of rows that have the columns `found` (none: no row could be read).

    `columns` maps our name of a column to the file's ({"completion": "answer"}). `wanted`: the kinds that decide where
    the columns fit several. Raises DataError when they fit none, or several all the same and `format` is auto, and for
    a column map that does not fit the file.
    """
    names = dict(columns or {})
    _check_names(file, names, found)
    ours = [*names, *(name for name in found if name not in names and name not in names.values())]
    return Columns(
        _fitting(file, ours, found, wanted) if format == "auto" else _named(file, format, ours, found), names
    )


def example(row: Json, format: str, place: str = "") -> Example:
    """One row, under our column names, as an example of that format. Raises DataError with the reason alone."""
    row = {name: value for name, value in row.items() if value is not None}  # tables pad missing values with null
    chosen = FORMATS[format]
    for name in chosen.missing(row):
        raise DataError(f"no {name!r}; a row of {chosen.described} needs it; it has {listed(row)}")
    return chosen.parse(row)._replace(place=place)


def _renamed(row: Json, names: Mapping[str, str]) -> Json:
    if not names:
        return row
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
                f"data.columns.{ours}: {file} has no column {theirs!r}{suggest(theirs, found)}; it has {listed(found)}"
            )


def _fitting(file: str, ours: Sequence[str], found: Sequence[str], wanted: Collection[str]) -> Format:
    fitting = [f for f in FORMATS.values() if not f.missing(ours)]
    formats = [f for f in fitting if f.kind in wanted] or fitting
    if len(formats) > 1:  # a prompt that has more beside it is meant with it
        formats = [f for f in formats if f not in prompts.FORMATS]
    if len(formats) == 1:
        return formats[0]
    if formats:
        names = " or ".join(f.name for f in formats)
        raise DataError(f"{file} could be {names} by its columns {listed(found)}; say which with data.format")
    if not found:
        return FORMATS["messages"]  # no row at all could be read: the faults tell more than the columns
    raise DataError(f"{file} has the columns {listed(found)}; {_known(wanted)}; rename with data.columns{_hint(found)}")


def _named(file: str, format: str, ours: Sequence[str], found: Sequence[str]) -> Format:
    if format not in FORMATS:
        known = ", ".join(FORMATS)
        raise DataError(f"data.format: {format!r} is not known{suggest(format, FORMATS)}; auto, {known} are")
    missing = FORMATS[format].missing(ours)
    if missing and found:
        raise DataError(
            f"{file}: data.format is {format}, but there is no column {' and no column '.join(missing)}; "
            f"it has {listed(found)}; rename with data.columns"
        )
    return FORMATS[format]


def _known(wanted: Collection[str]) -> str:
    """The columns of the formats that the objective can use."""
    formats = [f for f in FORMATS.values() if f.kind in wanted]
    sets = {f.name: ", or ".join(" + ".join(columns) for columns in f.needed) for f in formats}
    return "known are " + "; ".join(f"{name}: {columns}" for name, columns in sets.items())


def _hint(found: Collection[str]) -> str:
    asked, answered = ([name for name in names if name in found] for names in (ASKED, ANSWERED))
    if len(asked) != 1 or len(answered) != 1:
        return ""
    return (
        f", perhaps as {{prompt: {asked[0]}, completion: {answered[0]}}} for plain text, "
        f"or {{instruction: {asked[0]}, output: {answered[0]}}} for the chat template"
    )
