"""Encoded examples kept on disk, so that a large source is tokenised once: by all that goes into an encoding.

An entry is one file: the rows' bytes, their tables, a JSON document, its length, and the sha256 of all before. One that
is damaged is ignored and written anew.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from peftctl import __version__
from peftctl.base import cache_folder
from peftctl.data.encoded import Dataset, Lazy, Report
from peftctl.data.packed import Packed, Read, reading, tables_of
from peftctl.data.sources import Fault, Part, fingerprint, place
from peftctl.errors import SaveError
from peftctl.objectives.base import Objective
from peftctl.storage import TEMPORARY

SMALL = 1 << 16  # bytes of a source that is encoded in a moment anyway
LARGEST = 2 << 30  # bytes of all entries; those that were used longest ago go first
DIGEST, LENGTH = 32, 8  # bytes

Loaded = tuple[Dataset, Report]


class Made(NamedTuple):
    """What was encoded: tables of examples whose bytes lie elsewhere. `stems`: how places begin, by part."""

    packed: Packed
    report: Report
    stems: tuple[str, ...]
    fingerprint: str

    def loaded(self, read: Read) -> Loaded:
        places = self.packed.places
        lazy = Lazy(len(places), lambda index: place(self.stems, places[index]))
        return Dataset(self.report.name, self.packed.examples(read), lazy, self.fingerprint), self.report


Make = Callable[[Callable[[bytes], Any]], Made]  # given what takes the rows' bytes, one piece after the other


def key(
    parts: Sequence[Part], tokenizer: Callable[[], str], objective: Objective[Any], config: Any, options: Sequence[Any]
) -> str | None:
    """What an encoding depends on: the sha256 of the source and that of all else; None for one that is small, or that
    cannot be read."""
    try:
        if sum(part.bytes() for part in parts) < SMALL:
            return None
        content = fingerprint(parts)
    except OSError:
        return None  # whoever reads it next says what is wrong
    rest = [
        *(sys.byteorder, __version__, version("tokenizers"), version("jinja2"), _code(objective)),
        *([part.stem for part in parts], tokenizer(), objective.name, config.model_dump(mode="json"), *options),
    ]
    return f"{content}-{hashlib.sha256(json.dumps(rest).encode()).hexdigest()}"


def kept(key: str | None, make: Make) -> Loaded:
    """The entry of that key, else what `make` answers, which is then kept."""
    if key is None:
        return _in_memory(make)
    path = cache_folder() / "tokens" / key
    with suppress(OSError, ValueError):
        found = _opened(path)
        os.utime(path)
        return found
    with suppress(OSError, SaveError):  # without an entry the next run takes longer, and that is all
        found = _written(path, make)
        with suppress(OSError):
            _prune(path.parent)
        return found
    return _in_memory(make)


def _in_memory(make: Make) -> Loaded:
    content = bytearray()
    return make(content.extend).loaded(lambda start, end: bytes(memoryview(content)[start:end]))


def _code(objective: Objective[Any]) -> str:
    """The code that encodes: whoever works on it must not get yesterday's rows."""
    files = [*sorted(Path(__file__).parent.rglob("*.py")), Path(inspect.getfile(objective.encode))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _written(path: Path, make: Make) -> Loaded:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    digest = hashlib.sha256()
    try:
        with temporary.open("wb") as file:

            def write(data: bytes) -> None:
                file.write(data)
                digest.update(data)

            made = make(write)
            tables = [table.tobytes() for table in made.packed.tables]
            report = made.report._asdict()
            head = [made.packed.roles, list(map(len, tables)), report, made.stems, made.fingerprint]
            document = json.dumps(head).encode()
            for part in (*tables, document, len(document).to_bytes(LENGTH, "little")):
                write(part)
            file.write(digest.digest())
        if path.name.startswith(made.fingerprint):  # not where a file was changed meanwhile
            os.replace(temporary, path)
            return made.loaded(reading(path))
        return made.loaded(reading(temporary))  # which is read on when it has no name any more
    finally:
        temporary.unlink(missing_ok=True)


def _opened(path: Path) -> Loaded:
    """Raises ValueError for what is damaged."""
    size = path.stat().st_size - DIGEST
    with path.open("rb") as file:
        digest, left = hashlib.sha256(), size
        while left > 0 and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
        if file.read() != digest.digest() or size < LENGTH:
            raise ValueError("damaged")
        file.seek(size - LENGTH)
        length = int.from_bytes(file.read(LENGTH), "little")
        file.seek(size - LENGTH - length)
        roles, lengths, report, stems, content = json.loads(file.read(length))
        file.seek(size - LENGTH - length - sum(lengths))
        packed = Packed(roles, tables_of(lengths, file.read))
    lists = {name: tuple(report[name]) for name in ("unused", "histogram")}
    lists["faults"] = tuple(Fault(*fault) for fault in report["faults"])
    return Made(packed, Report(**report | lists), tuple(stems), content).loaded(reading(path))


def _prune(folder: Path) -> None:
    """Drop the oldest entries beyond what is allowed; the newest stays whatever its size."""
    entries = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for number, path in enumerate(entries):
        total += path.stat().st_size
        if number and total > LARGEST:
            path.unlink(missing_ok=True)
