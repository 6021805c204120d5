"""JSON lines, one object a line; or one JSON list of objects."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from gzip import BadGzipFile
from pathlib import Path
from typing import Any

from peftctl.data.sources.lines import BOM, lines, opened, text
from peftctl.data.sources.records import START, Json, Mark, Record
from peftctl.errors import DataError


def rows(path: Path, name: str, start: Mark = START) -> Iterator[Record]:
    for line in lines(path, name, start):
        if isinstance(line, Record):
            yield line
        elif line.content.strip():
            yield Record(line.number, _row(line.content), line.after)


def either(path: Path, name: str, start: Mark = START) -> Iterator[Record]:
    """Many files called .json hold JSON lines; a list is told by its first character."""
    return _list(path, name, start) if _starts_with_bracket(path, name) else rows(path, name, start)


def _starts_with_bracket(path: Path, name: str) -> bool:
    try:
        with opened(path) as file:
            return file.read(4096).removeprefix(BOM).lstrip().startswith(b"[")
    except (OSError, EOFError, zlib.error):
        return False  # what is wrong with it is told where it is read


def _row(line: bytes) -> Json | str:
    try:
        value = DECODER.decode(text(line).strip())
    except DataError as error:
        return str(error)
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


def _list(path: Path, name: str, start: Mark) -> Iterator[Record]:
    """A list is read whole, so a mark counts its rows."""
    for number, (line, row) in enumerate(_items(path, name), 1):
        if number > start.offset:
            yield Record(line, row, Mark(number, line))


def _items(path: Path, name: str) -> Iterator[tuple[int, Json | str]]:
    try:
        with opened(path) as file:
            document = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: invalid UTF-8 at byte {error.start + 1}") from None
    except (EOFError, BadGzipFile, zlib.error):
        raise DataError(f"{name}: the gzip file breaks off or is damaged") from None
    at, line, counted = _skip(document, 0, "["), 1, 0
    while not document.startswith("]", at):
        line, counted = line + document.count("\n", counted, at), at
        try:
            value, end = DECODER.raw_decode(document, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}:{line}: {_invalid(error)}; the list cannot be read past it") from None
        yield line, _object(value)
        at = _skip(document, end, ",")
        if not document.startswith("]", at) and "," not in document[end:at]:
            raise DataError(f"{name}:{line}: invalid JSON: no comma after this row; the list cannot be read past it")
    if document[at + 1 :].strip():
        raise DataError(f"{name}: there is more after the end of the JSON list")


def _skip(document: str, at: int, mark: str) -> int:
    """Past white space, the mark if it is there, and white space."""
    at = _space(document, at)
    return _space(document, at + len(mark)) if document.startswith(mark, at) else at


def _space(document: str, at: int) -> int:
    while document[at : at + 1].isspace():
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
