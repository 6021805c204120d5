"""The safetensors files of a model folder: which they are, what their headers say, and the weights' fingerprint.

Torch-free. A header is believed only when its tensors fill the file without gaps or overlaps.
"""

from __future__ import annotations

import hashlib
import json
import struct
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from peftctl.errors import FormatError, ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LARGEST_HEADER = 32 << 20  # bytes; some 200,000 tensors, more than any model keeps in one file
MOST_DIMENSIONS = 64  # torch's own limit
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
SAMPLE = 1024  # bytes at the start, the middle and the end of a tensor


class Entry(NamedTuple):
    """One tensor of a file; offsets count from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Shard(NamedTuple):
    """One file: its tensors in the order of their bytes, and where those begin."""

    path: Path
    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    data: int


def shards(folder: Path) -> list[Shard]:
    """The weight files of a model folder that transformers would read. Raises ModelError, FormatError."""
    if (folder / INDEX).is_file():
        return [read(folder / name) for name in _named(folder / INDEX)]
    if not (folder / SINGLE).is_file():
        raise ModelError(f"{folder} holds neither {SINGLE} nor {INDEX}: its weights must be saved as safetensors")
    return [read(folder / SINGLE)]


def _named(index: Path) -> list[str]:
    """File names in an index, which may name files of its own folder only."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FormatError(f"{index} is not an index: it has no weight_map of file names") from None
    outside = [n for n in names if not isinstance(n, str) or Path(n).name != n or n in ("", "..")]
    if outside:
        raise FormatError(f"{index}: the file name {outside[0]!r} leads out of the folder")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelError(f"{index} names {', '.join(missing[:5])}, missing from its folder: fetch the model again")
    return names


def read(path: Path) -> Shard:
    """The header of one safetensors file. Raises FormatError for a file that lies about itself."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
        if length > min(size - 8, LARGEST_HEADER):
            raise FormatError(f"{path} is not a whole safetensors file: {size:,} bytes, a header of {length:,}")
        raw = file.read(length)
    try:
        document = json.loads(raw, object_pairs_hook=_distinct)
        metadata = document.pop("__metadata__", None) or {}
        entries = sorted((_entry(name, e) for name, e in document.items()), key=lambda e: (e.start, e.end))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise FormatError(f"{path}: its header is not that of a safetensors file") from None
    _filled(path, entries, size - 8 - length)
    return Shard(path, tuple(entries), metadata, 8 + length)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _entry(name: str, document: dict[str, Any]) -> Entry:
    start, end = map(int, document["data_offsets"])
    if len(document["shape"]) > MOST_DIMENSIONS:
        raise ValueError("more dimensions than a tensor has")
    return Entry(name, str(document["dtype"]), tuple(map(int, document["shape"])), start, end)


def _filled(path: Path, entries: list[Entry], size: int) -> None:
    """The tensors lie side by side, to the end of the file, each of the size that its shape asks for."""
    at = 0
    for entry in entries:
        width = WIDTHS.get(entry.dtype)
        expected = entry.end - entry.start if width is None else width * prod(entry.shape)
        if entry.start != at or entry.end - entry.start != expected or min(entry.shape, default=0) < 0:
            raise FormatError(f"{path}: {entry.name} overlaps, leaves a gap or does not have the size of its shape")
        at = entry.end
    if at != size:
        raise FormatError(f"{path}: {at:,} bytes of tensors expected, {size:,} found; fetch the file again")


def header(entries: list[Entry], metadata: dict[str, str]) -> bytes:
    """The beginning of a file that holds these tensors."""
    document: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for entry in entries:
        offsets = [entry.start, entry.end]
        document[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def fingerprint(folder: Path) -> str:
    """What identifies a model's weights without reading them all: names, types, shapes and samples of the tensors.

    The same however they are cut into files. Raises ModelError, FormatError, OSError.
    """
    table = []
    for shard in shards(folder):
        with shard.path.open("rb") as file:
            table += [[e.name, e.dtype, list(e.shape), _sampled(file, shard.data, e)] for e in shard.entries]
    return hashlib.sha256(json.dumps(sorted(table)).encode()).hexdigest()


def _sampled(file: BinaryIO, data: int, entry: Entry) -> str:
    """The sha256 of three samples of a tensor, or of all of a small one."""
    digest, last = hashlib.sha256(), max(entry.start, entry.end - SAMPLE)
    for start in dict.fromkeys((entry.start, (entry.start + last) // 2, last)):
        file.seek(data + start)
        digest.update(file.read(min(SAMPLE, entry.end - start)))
    return digest.hexdigest()
