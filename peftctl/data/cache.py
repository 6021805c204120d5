"""Encoded examples kept on disk, so that a large file is tokenised once: by all that goes into an encoding.

An entry is one file: the sha256 of the rest, the length of a JSON document, the document, and then the tokens' ids and
the indices of their weights as 32-bit numbers. One that is damaged is ignored and written anew.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

from peftctl import __version__
from peftctl.base import cache_folder
from peftctl.data.encoded import Dataset, Report
from peftctl.data.sources import Fault, files, fingerprint, shown
from peftctl.errors import DataError, SaveError
from peftctl.objectives.base import Objective
from peftctl.row import Row
from peftctl.storage import write_file

SMALL = 1 << 16  # bytes of a file that is encoded in a moment anyway
LARGEST = 2 << 30  # bytes of all entries; those that were used longest ago go first
DIGEST, LENGTH = 32, 8  # bytes

Loaded = tuple[Dataset, Report]


def key(
    path: str | Path, tokenizer: Callable[[], str], objective: Objective[Any], config: Any, options: Sequence[Any]
) -> str | None:
    """What an encoding depends on: the sha256 of the files and that of all else; None for files that are small, or that
    cannot be read."""
    try:
        found = [file.path for file in files(path)]
        if sum(map(os.path.getsize, found)) < SMALL:
            return None
        content = fingerprint(found)
    except (OSError, DataError):
        return None  # whoever reads it next says what is wrong
    rest = [
        *(sys.byteorder, __version__, version("tokenizers"), version("jinja2"), _code(objective)),
        *(shown(Path(path)), tokenizer(), objective.name, config.model_dump(mode="json"), *options),
    ]
    return f"{content}-{hashlib.sha256(json.dumps(rest).encode()).hexdigest()}"


def kept(key: str | None, make: Callable[[], Loaded]) -> Loaded:
    """The entry of that key, else what `make` answers, which is then kept."""
    if key is None:
        return make()
    path = cache_folder() / "tokens" / key
    with suppress(OSError, ValueError):
        found = _unpacked(path.read_bytes())
        os.utime(path)
        return found
    made = make()
    if key.startswith(made[0].fingerprint):  # not where the file was changed meanwhile
        with suppress(OSError, SaveError):  # without an entry the next run takes longer, and that is all
            write_file(path, _packed(*made))
            _prune(path.parent)
    return made


def _code(objective: Objective[Any]) -> str:
    """The code that encodes: whoever works on it must not get yesterday's rows."""
    files = [*sorted(Path(__file__).parent.rglob("*.py")), Path(inspect.getfile(objective.encode))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _packed(dataset: Dataset, report: Report) -> bytes:
    rows = list(chain.from_iterable(dataset.examples))
    values = sorted(set().union(*(row.weights for row in rows)))
    index = {value: number for number, value in enumerate(values)}
    heads = [[row.targets, row.types] for row in rows]
    document = {
        "dataset": [dataset.name, dataset.places, dataset.fingerprint],
        "report": report._asdict(),
        "examples": [len(own) for own in dataset.examples],
        "rows": [(row.role, len(row.ids)) for row in rows],
        "weights": values,
        "heads": heads if any(any(one) for one in heads) else [],
    }
    numbers = array("I", chain.from_iterable(row.ids for row in rows))
    numbers.extend(map(index.__getitem__, chain.from_iterable(row.weights for row in rows)))
    head = json.dumps(document).encode()
    body = len(head).to_bytes(LENGTH, "little") + head + numbers.tobytes()
    return hashlib.sha256(body).digest() + body


def _unpacked(data: bytes) -> Loaded:
    """Raises ValueError for what is damaged."""
    body = memoryview(data)[DIGEST:]
    if hashlib.sha256(body).digest() != data[:DIGEST]:
        raise ValueError("damaged")
    start = LENGTH + int.from_bytes(body[:LENGTH], "little")
    document = json.loads(bytes(body[LENGTH:start]))
    numbers = array("I", bytes(body[start:]))
    rows = _rows(document, numbers)
    examples = tuple(
        tuple(row._replace(example=number) for row in islice(rows, count))
        for number, count in enumerate(document["examples"])
    )
    name, places, digest = document["dataset"]
    report = document["report"]
    lists = {"faults": tuple(Fault(*fault) for fault in report["faults"]), "unused": tuple(report["unused"])}
    return Dataset(name, examples, tuple(places), digest), Report(**report | lists)


def _rows(document: dict[str, Any], numbers: array[int]) -> Iterator[Row]:
    values, middle, start = document["weights"], len(numbers) // 2, 0
    heads = document["heads"] or repeat(((), ()))
    for (role, length), (targets, types) in zip(document["rows"], heads, strict=False):
        weights = tuple(map(values.__getitem__, numbers[middle + start : middle + start + length]))
        yield Row(tuple(numbers[start : start + length]), weights, 0, role, tuple(targets), tuple(types))
        start += length


def _prune(folder: Path) -> None:
    """Drop the oldest entries beyond what is allowed; the newest stays whatever its size."""
    entries = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    total = entries[0].stat().st_size
    for path in entries[1:]:
        total += path.stat().st_size
        if total > LARGEST:
            path.unlink(missing_ok=True)
