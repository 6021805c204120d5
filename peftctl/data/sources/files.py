"""Which files a path means, one, a folder's or a pattern's, and which reader each has by its name."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from peftctl.data.sources import jsonl, parquet, plain, table
from peftctl.data.sources.lines import ZIPPED
from peftctl.data.sources.records import START, Mark, Reader, Record
from peftctl.errors import DataError, suggest

READERS: dict[str, Reader] = {
    ".jsonl": jsonl.rows,
    ".ndjson": jsonl.rows,
    ".json": jsonl.either,
    ".csv": table.csv_rows,
    ".tsv": table.tsv_rows,
    ".parquet": parquet.rows,
    ".txt": plain.rows,
}
KNOWN = ", ".join(READERS)
SAMPLES, SAMPLE = 64, 1 << 16  # that stand for a file, evenly spread, its beginning and end among them; bytes of one


class File(NamedTuple):
    """A file as a part of a source; `name`: as errors show it."""

    path: Path
    name: str

    @property
    def stem(self) -> str:
        return f"{self.name}:{'row ' if kind(self.path) == '.parquet' else ''}"

    def records(self, start: Mark = START) -> Iterator[Record]:
        try:
            yield from READERS[kind(self.path)](self.path, self.name, start)
        except OSError as error:
            raise DataError(f"data file {self.name} cannot be read: {error.strerror or error}") from None

    def bytes(self) -> int:
        return self.path.stat().st_size

    def total(self) -> int | None:
        if self.path.suffix.lower() == ZIPPED or kind(self.path) == ".json":
            return None
        return parquet.count(self.path, self.name) if kind(self.path) == ".parquet" else self.bytes()

    def digest(self) -> str:
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    def sample(self) -> str:
        size = self.bytes()
        digest = hashlib.sha256(str(size).encode())
        with open(self.path, "rb") as file:
            for number in range(SAMPLES):
                file.seek((size - SAMPLE) * number // (SAMPLES - 1) if size > SAMPLE else 0)
                digest.update(file.read(SAMPLE))
        return digest.hexdigest()


def kind(path: Path) -> str:
    """The suffix that tells what is in a file, compressed or not."""
    plainly = path.with_suffix("") if path.suffix.lower() == ZIPPED else path
    return plainly.suffix.lower()


def files(path: str | Path) -> list[File]:
    """The data files that a path means, in the order of their names. Raises DataError.

    Of a folder, those that it holds itself, other files are passed by; of a pattern (`*`, `?`, `[...]`, `**` for any
    folders), all that it matches.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(one for one in path.iterdir() if one.is_file() and kind(one) in READERS and one.name[0] != ".")
        if not found:
            raise DataError(f"data folder {shown(path)} holds no data file ({KNOWN}, each also with .gz)")
    elif not path.is_file() and glob.has_magic(str(path)):
        found = [Path(one) for one in sorted(glob.glob(str(path), recursive=True)) if Path(one).is_file()]
        if not found:
            raise DataError(f"data files {shown(path)}: there is none that fits the pattern")
    else:
        found = [path]
    return [File(_checked(one), shown(one)) for one in found]


def shown(path: Path) -> str:
    """The path as a reader wants it in an error: relative when it lies under the current directory."""
    try:
        return str(path.relative_to(Path.cwd())) if path.is_absolute() else str(path)
    except ValueError:
        return str(path)


def _checked(path: Path) -> Path:
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = suggest(path.name, beside)
        raise DataError(f"data file {shown(path)} does not exist{near or f'; a file is needed: {KNOWN}'}")
    if kind(path) not in READERS:
        raise DataError(f"data file {shown(path)}: {path.suffix or 'no suffix'} is not read; {KNOWN} are")
    return path
