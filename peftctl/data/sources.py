"""Reading a file of examples: JSON lines, or one JSON list, each row with its place; what cannot be read has a reason.

A bad line is a `Fault`, not an exception, so that the caller can refuse the file or leave the line out; a file that is
no data file at all raises DataError.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from peftctl.errors import DataError, suggest

Json = dict[str, Any]

LINES, LIST = (".jsonl", ".ndjson"), ".json"
BOM = b"\xef\xbb\xbf"


class Fault(NamedTuple):
    """A row that cannot be used: where it is and why."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class Source(NamedTuple):
    """The rows of a file, each with its place `file:line`, and the lines that are no rows."""

    name: str
    rows: list[tuple[str, Json]]
    faults: list[Fault]
    fingerprint: str


def read(path: str | Path, limit: int | None = None) -> Source:
    """The first `limit` rows of a `.jsonl`, `.ndjson` or `.json` file, blank lines not counted.

    Raises DataError for a file that is missing, of another kind, or empty, and for a JSON list that breaks off.
    """
    path = Path(path)
    _check(path)
    name = shown(path)
    rows: list[tuple[str, Json]] = []
    faults: list[Fault] = []
    for place, row in islice(_rows(path, name), limit):
        rows.append((place, row)) if isinstance(row, dict) else faults.append(Fault(place, row))
    if not rows and not faults:
        raise DataError(f"{name}: the file is empty; a data file has one JSON object a line")
    return Source(name, rows, faults, fingerprint(path))


def fingerprint(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def shown(path: Path) -> str:
    """The path as a reader wants it in an error: relative when it lies under the current directory."""
    try:
        return str(path.relative_to(Path.cwd())) if path.is_absolute() else str(path)
    except ValueError:
        return str(path)


def _check(path: Path) -> None:
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        found = "is a folder" if path.is_dir() else f"does not exist{suggest(path.name, beside)}"
        raise DataError(f"data file {shown(path)} {found}; a .jsonl or .json file is needed")
    if path.suffix.lower() not in (*LINES, LIST):
        raise DataError(f"data file {shown(path)}: {path.suffix or 'no suffix'} is not read; .jsonl and .json are")


def _rows(path: Path, name: str) -> Iterator[tuple[str, Json | str]]:
    """Each row's place with the row, or with the reason why it is none."""
    # many files called .json hold JSON lines; a list is told by its first character
    if path.suffix.lower() == LIST and _starts_with_bracket(path):
        yield from _list(path, name)
    else:
        yield from _lines(path, name)


def _starts_with_bracket(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4096).removeprefix(BOM).lstrip().startswith(b"[")


def _lines(path: Path, name: str) -> Iterator[tuple[str, Json | str]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):  # binary: only \n ends a line, never U+2028
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                yield f"{name}:{number}", _row(line)


def _row(line: bytes) -> Json | str:
    try:
        value = DECODER.decode(line.decode("utf-8").strip())
    except UnicodeDecodeError as error:
        return f"invalid UTF-8 at byte {error.start + 1} of the line"
    except (ValueError, RecursionError) as error:
        return _invalid(error)
    return _object(value)


def _object(value: Any) -> Json | str:
    kinds = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "a boolean"}
    return value if isinstance(value, dict) else f"not a JSON object but {kinds.get(type(value), 'null')}"


def _invalid(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON: {error.msg} (column {error.colno})"
    return f"invalid JSON: {'nested too deep' if isinstance(error, RecursionError) else error}"


def _list(path: Path, name: str) -> Iterator[tuple[str, Json | str]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: invalid UTF-8 at byte {error.start + 1}") from None
    at, line, counted = _skip(text, 0, "["), 1, 0
    while not text.startswith("]", at):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}:{line}: {_invalid(error)}; the list cannot be read past it") from None
        yield f"{name}:{line}", _object(value)
        at = _skip(text, end, ",")
        if not text.startswith("]", at) and "," not in text[end:at]:
            raise DataError(f"{name}:{line}: invalid JSON: no comma after this row; the list cannot be read past it")
    if text[at + 1 :].strip():
        raise DataError(f"{name}: there is more after the end of the JSON list")


def _skip(text: str, at: int, mark: str) -> int:
    """Past white space, the mark if it is there, and white space."""
    at = _space(text, at)
    return _space(text, at + len(mark)) if text.startswith(mark, at) else at


def _space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _unique(pairs: list[tuple[str, Any]]) -> Json:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice in one object")
    return row


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)
