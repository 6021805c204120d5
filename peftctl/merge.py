"""The streaming merge: shard by shard, one tensor in memory at a time, untouched tensors byte for byte.

Works on the files alone: the model is on the meta device, and only says which names on disk are which modules.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from peftctl.errors import FormatError, InputError, SaveError, Unfoldable
from peftctl.methods.attachment import Attachment, Delta
from peftctl.skeleton import dotted
from peftctl.storage import TEMPORARY

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LARGEST_HEADER = 100 << 20
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
COPIED = ("*.json", "*.jinja", "*.model", "*.txt")

Folds = dict[str, list[Delta]]  # full name of a parameter -> the deltas that change it, in order


class Entry(NamedTuple):
    """One tensor of a safetensors file; offsets count from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def merge(
    base: Path,
    model: Any,
    attachment: Attachment,
    output: Path,
    *,
    dtype: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the base's files with the deltas folded in, to a folder that appears when it is whole.

    `progress` gets bytes done and bytes in all. Raises Unfoldable, InputError, FormatError before anything is
    written, SaveError.
    """
    if output.exists():
        raise InputError(f"--output: {output} exists already; name another folder or remove it")
    shards = [base / name for name in _shards(base)]
    headers = {shard: _header(shard) for shard in shards}
    folds = _by_name_on_disk(model, _folds(attachment, model), headers)
    if dtype is not None and dtype not in NAMES:
        raise InputError(f"--dtype: {dtype!r} is none of {', '.join(NAMES)}")
    total, done = sum(shard.stat().st_size for shard in shards), 0
    with _aside(output) as temporary:
        for shard in shards:
            _shard(shard, temporary / shard.name, headers[shard], folds, dtype and NAMES[dtype])
            done += shard.stat().st_size
            progress(done, total)
        _companions(base, temporary, dtype)


def _shards(base: Path) -> list[str]:
    """File names of the base's weights; an index may name files of its own folder only."""
    if not (base / INDEX).is_file():
        return [SINGLE]
    names = sorted(set(json.loads((base / INDEX).read_text("utf-8"))["weight_map"].values()))
    outside = [name for name in names if Path(name).name != name or not (base / name).is_file()]
    if outside:
        raise FormatError(f"{base / INDEX} names {outside[0]!r}, which is no file of its folder")
    return names


def _header(path: Path) -> tuple[list[Entry], dict[str, str]]:
    """The tensors of a safetensors file and its metadata. Raises FormatError for a file that lies about itself."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
        if length > min(size - 8, LARGEST_HEADER):
            raise FormatError(f"{path}: a header of {length} bytes in a file of {size}")
        try:
            raw = json.loads(file.read(length))
        except ValueError:
            raise FormatError(f"{path}: its header is not JSON") from None
    metadata = raw.pop("__metadata__", {})
    entries = [Entry(n, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for n, e in raw.items()]
    entries.sort(key=lambda entry: entry.start)
    ends = [0, *(entry.end for entry in entries)]
    if any(entry.start != end for entry, end in zip(entries, ends, strict=False)) or ends[-1] != size - 8 - length:
        raise FormatError(f"{path}: its tensors overlap, leave gaps or run past the end of the file")
    return entries, metadata


def _folds(attachment: Attachment, model: nn.Module) -> Folds:
    """Every delta under the parameters that it changes. Raises Unfoldable for one that no weight can hold."""
    names = dict(model.named_parameters(remove_duplicate=False))
    shared = {id(p): [n for n, q in names.items() if q is p] for p in names.values()}
    found: Folds = {}
    for path, delta in attachment.named_deltas():
        if not delta.folds():
            delta.fold("weight", torch.zeros(0))  # says why it cannot
            raise Unfoldable(f"{path or type(delta).__name__}: no plain weight can hold this change")
        for name in delta.folds():
            full = dotted(path, name)
            if full not in names:
                delta.fold(name, torch.zeros(0))
                raise Unfoldable(f"{full}: the base has no such parameter, so the change has nowhere to go")
            others = [other for other in shared[id(names[full])] if other != full]
            if others:
                raise Unfoldable(
                    f"{full} is tied to {', '.join(others)}, so folding would change both: "
                    "leave it out of the targets, or serve the adapter unmerged"
                )
            found.setdefault(full, []).append(delta)
    return found


def _by_name_on_disk(model: Any, folds: Folds, headers: dict[Path, tuple[list[Entry], dict[str, str]]]) -> Folds:
    """The same under the names that the files use: as in the model, or without or with the base's own first part."""
    on_disk = {entry.name: entry for entries, _ in headers.values() for entry in entries}
    first = f"{getattr(model, 'base_model_prefix', '')}."
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    found: Folds = {}
    lost = []
    for full, deltas in folds.items():
        candidates = [full, full.removeprefix(first), first + full]
        name = next((n for n in candidates if n in on_disk and on_disk[n].shape == shapes[full]), None)
        if name is None:
            lost.append(full)
        else:
            found[name] = deltas
    if lost:
        raise Unfoldable(
            f"{', '.join(lost[:5])}{' and others' if len(lost) > 5 else ''}: stored under another name or form in the "
            f"base's files ({type(model).__name__}), which merging does not translate yet"
        )
    return found


def _shard(
    source: Path, target: Path, header: tuple[list[Entry], dict[str, str]], folds: Folds, dtype: str | None
) -> None:
    """One shard with its folds; tensors keep their order."""
    entries, metadata = header
    kept = [entry._replace(dtype=dtype or entry.dtype) if entry.dtype in DTYPES else entry for entry in entries]
    with (
        source.open("rb") as raw,
        mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        target.open("wb") as out,
    ):
        if [entry.dtype for entry in kept] == [entry.dtype for entry in entries]:
            start = len(mapped) - entries[-1].end if entries else len(mapped)
            out.write(mapped[:start])  # the same header, to the byte
        else:
            start = len(mapped) - entries[-1].end
            out.write(_encoded(kept, metadata))
        for entry, new in zip(entries, kept, strict=True):
            _tensor(mapped, start, entry, new.dtype, folds.get(entry.name, []), out)
        out.flush()
        os.fsync(out.fileno())


def _tensor(mapped: mmap.mmap, start: int, entry: Entry, dtype: str, deltas: list[Delta], out: BinaryIO) -> None:
    span = memoryview(mapped)[start + entry.start : start + entry.end]
    try:
        if not deltas and dtype == entry.dtype:
            out.write(span)
            return
        if entry.dtype not in DTYPES:
            raise Unfoldable(f"{entry.name} is stored as {entry.dtype}, which cannot be folded into")
        weight = torch.frombuffer(bytearray(span), dtype=DTYPES[entry.dtype]).reshape(entry.shape)
        out.write(_bytes(_folded(entry.name, weight, deltas).to(DTYPES[dtype])))
    finally:
        span.release()


@torch.no_grad()
def _folded(name: str, weight: Tensor, deltas: list[Delta]) -> Tensor:
    """In fp32 (fp64 stays): the sum is rounded once, to the stored type."""
    weight = weight if weight.dtype is torch.float64 else weight.float()
    for delta in deltas:
        weight = delta.fold(name.rpartition(".")[2], weight)
    if not torch.isfinite(weight).all():
        raise FormatError(f"{name}: the folded weight is not finite; the adapter is broken")
    return weight


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")


def _encoded(entries: list[Entry], metadata: dict[str, str]) -> bytes:
    """A header for other dtypes: sizes and offsets anew."""
    document: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for entry in entries:
        width = DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else None
        size = width * torch.Size(entry.shape).numel() if width else entry.end - entry.start
        document[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _companions(base: Path, target: Path, dtype: str | None) -> None:
    """Config, tokenizer, template and index, copied; the config says the new type where there is one."""
    for pattern in COPIED:
        for file in base.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
    if dtype is not None:
        config = json.loads((target / "config.json").read_text("utf-8"))
        config.pop("torch_dtype", None)
        (target / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n", "utf-8")


@contextmanager
def _aside(output: Path) -> Iterator[Path]:
    temporary = output.with_name(f"{TEMPORARY}{output.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, output)
    except OSError as error:
        free = shutil.disk_usage(output.parent).free if output.parent.is_dir() else 0
        raise SaveError(f"{output} could not be written: {error.strerror or error} ({free:,} bytes free)") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
