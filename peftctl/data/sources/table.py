"""CSV and TSV: a header with the columns' names, then rows of texts.

A cell is a text, an empty one a missing value. What a column holds in other formats beside texts is spelled out in its
cell: messages as JSON, a judgement as true or false; see `spelled`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from peftctl.data.sources.lines import LONGEST, lines
from peftctl.data.sources.records import START, Cells, Json, Mark, Record
from peftctl.errors import DataError

TEXTS_OR_MESSAGES = ("prompt", "completion", "chosen", "rejected")
LISTS = ("messages", "conversations", "history", "tokens", "tags")
TRUTHS = {"true": True, "1": True, "false": False, "0": False}


def _rows(path: Path, name: str, start: Mark = START, *, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(LONGEST)
    records = _records(path, name, START, delimiter)
    first = next(records, None)
    if first is None:
        return
    if isinstance(first[1], str):
        raise DataError(f"{name}:{first[0]}: {first[1]}; the first row must name the columns")
    header = _header(first[1], f"{name}:{first[0]}")
    records = _records(path, name, start, delimiter) if start.offset else records
    for line, cells, after in records:
        yield Record(line, cells if isinstance(cells, str) else _row(header, cells), after)


csv_rows = partial(_rows, delimiter=",")
tsv_rows = partial(_rows, delimiter="\t")


def spelled(row: Json, kind: str) -> Json:
    """A row of cells, under our names, as rows of other formats are. Raises DataError with the reason alone."""
    found = dict(row)
    for name, cell in row.items():
        if cell is None:
            continue
        if name in LISTS:
            found[name] = _json(cell, name)
        elif name == "label" and kind == "unpaired":
            found[name] = TRUTHS.get(cell.strip().lower(), cell)
        elif name in TEXTS_OR_MESSAGES and cell.lstrip().startswith("[{"):
            found[name] = _messages(cell)
    return found


def _json(cell: str, name: str) -> Any:
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is not JSON ({error}); in a table it is a JSON list") from None


def _messages(cell: str) -> Any:
    """The messages that a cell spells out, or its text: an answer may well be a list in JSON."""
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    return value if all(isinstance(item, dict) and "role" in item for item in value) else cell


class _Lines:
    """The lines of a file as `csv` asks for them; bytes that are no UTF-8 pass through as lone surrogates."""

    def __init__(self, path: Path, name: str, start: Mark) -> None:
        self.lines = lines(path, name, start)
        self.after = start
        self.fault = ""  # of a line that could not be read

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.after = line.after
        if isinstance(line, Record):
            self.fault = str(line.row)
            return "\n"
        return line.content.decode("utf-8", errors="surrogateescape")


def _records(path: Path, name: str, start: Mark, delimiter: str) -> Iterator[tuple[int, list[str] | str, Mark]]:
    """The cells of each row, or what is wrong with it, with the line where it begins."""
    feed = _Lines(path, name, start)
    reader = csv.reader(feed, delimiter=delimiter, strict=True)
    while True:
        line, feed.fault = feed.after.line + 1, ""
        try:
            cells: list[str] | str = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells = _invalid(error)
        cells = feed.fault or cells
        if isinstance(cells, str) or any(cell.strip() for cell in cells):
            yield line, cells, feed.after


def _invalid(error: csv.Error) -> str:
    if "unexpected end" in str(error):
        return "a quoted cell that begins in this row is not closed before the end of the file"
    if "larger than field limit" in str(error):
        return f"a cell is longer than {LONGEST >> 20} MiB: is a quote not closed?"
    if "new-line character" in str(error):
        return "a bare carriage return outside quotes"
    return f"invalid CSV: {error}"


def _header(cells: list[str], place: str) -> list[str]:
    twice = next((cell for cell in cells if cells.count(cell) > 1), None)
    if twice is not None:
        raise DataError(f"{place}: the header names the column {twice!r} twice")
    wrong = _fault(cells, cells)
    if wrong is not None:
        raise DataError(f"{place}: {wrong}, in the header")
    return cells


def _row(header: list[str], cells: list[str]) -> Json | str:
    if len(cells) != len(header):
        return f"{len(cells)} cells, where the header has {len(header)}"
    wrong = _fault(header, cells)
    return Cells({name: cell or None for name, cell in zip(header, cells, strict=True)}) if wrong is None else wrong


def _fault(header: list[str], cells: list[str]) -> str | None:
    checks: tuple[tuple[str, Callable[[str], bool]], ...] = (
        ("invalid UTF-8", lambda cell: not cell.isascii() and any("\udc80" <= c <= "\udcff" for c in cell)),
        ("a NUL character", lambda cell: "\0" in cell),
    )
    for what, wrong in checks:
        for name, cell in zip(header, cells, strict=True):
            if wrong(cell):
                return f"{what} in the column {name.encode('ascii', 'replace').decode()!r}"
    return None
