"""The streaming merge: shard by shard, one tensor in memory at a time, untouched tensors byte for byte.

Works on the files alone: the model is on the meta device, and only says which names on disk are which modules.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from peftctl.errors import FormatError, InputError, SaveError, Unfoldable
from peftctl.formats import headed, names
from peftctl.formats.shards import INDEX, WIDTHS, Entry, Shard, header, shards
from peftctl.methods.attachment import Attachment, Delta
from peftctl.skeleton import dotted
from peftctl.storage import TEMPORARY, publish
from peftctl.task import Task

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*")
BLOCK = 8 << 20


class Fold(NamedTuple):
    """One change of one parameter; `name` is the parameter's own, without the module's path."""

    name: str
    delta: Delta


Folds = dict[str, list[Fold]]  # full name -> the changes, in the order of their application


def merge(
    base: Path,
    model: Any,
    attachment: Attachment,
    output: Path,
    *,
    dtype: str | None = None,
    task: Task | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    finish: Callable[[Path], object] = lambda folder: None,
) -> None:
    """Write the base's files with the deltas folded in, to a folder that appears when it is whole.

    `task`: what the model is asked for; the head is written beside what the base's files hold. `progress` gets bytes
    done and bytes in all; `finish` may add files to the folder before it gets its name. Raises Unfoldable, InputError,
    FormatError, SaveError; there is no output then.
    """
    if dtype is not None and dtype not in NAMES:
        raise InputError(f"--dtype: {dtype!r} is none of {', '.join(NAMES)}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"--output: {output} exists already; name another folder or remove it")
    found = shards(base)
    folds = folds_of(attachment, model)
    head = headed.Head() if task is None else headed.new(model, folds, found)
    folds = _on_disk(model, {full: own for full, own in folds.items() if full not in head.tensors}, found)
    laid_out = [_laid_out(shard, dtype and NAMES[dtype], head) for shard in found]
    total, done = sum(laid[-1][1].end for laid in laid_out if laid), 0
    with _aside(output, total + head.size) as temporary:
        for name, shard, laid in zip(head.files(found), found, laid_out, strict=True):
            for size in _shard(shard, temporary / name, laid, folds):
                done += size
                progress(done, total)
        _companions(base, temporary, dtype, total)
        head.write(temporary, [[new for _, new in laid] for laid in laid_out], found)
        if task is not None:
            _rewrite(temporary / "config.json", lambda config: headed.config(config, task, model))
        finish(temporary)


def folds_of(attachment: Attachment, model: nn.Module) -> Folds:
    """Every delta under the parameters that it changes. Raises Unfoldable for one that no weight can hold."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    mirrored = {dotted(path, name) for path, delta in attachment.named_deltas() for name in delta.mirrors()}
    found: Folds = {}
    for path, delta in attachment.named_deltas():
        if delta.inert:
            continue
        if not delta.folds():
            delta.fold("weight", torch.zeros(0))  # says why it cannot
            raise Unfoldable(f"{path or type(delta).__name__}: no plain weight can hold this change")
        for name in delta.folds():
            full = dotted(path, name)
            if full not in parameters:
                delta.fold(name, torch.zeros(0))
                raise Unfoldable(f"{full}: the base has no such parameter, so the change has nowhere to go")
            _alone(full, parameters, mirrored)
            found.setdefault(full, []).append(Fold(name, delta))
    return found


def _alone(full: str, parameters: Mapping[str, nn.Parameter], mirrored: set[str]) -> None:
    """Refuse a change of a tied parameter that is not made at all its places."""
    others = [name for name, p in parameters.items() if p is parameters[full] and name != full]
    if len({full, *others} - mirrored) > 1:
        raise Unfoldable(
            f"{full} is tied to {', '.join(others)}, so folding would change both: "
            "leave it out of the targets, or serve the adapter unmerged"
        )


def _on_disk(model: Any, folds: Folds, found: list[Shard]) -> Folds:
    """The same under the names that the files use. Raises Unfoldable unless each parameter is one stored tensor."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    stored = {entry.name: entry for shard in found for entry in shard.entries}
    sources: dict[str, list[str]] = {}
    for name, place in names.parameters(model, stored).items():
        usable = place.whole and stored[name].dtype in DTYPES and stored[name].shape == shapes.get(place.parameter)
        sources.setdefault(place.parameter, []).append(name if usable else "")
    lost = [full for full in folds if len(sources.get(full, [])) != 1 or not sources[full][0]]
    # of a tied parameter, files hold one place or all
    unstored = {full for full in lost if full not in sources and all(f.name in f.delta.mirrors() for f in folds[full])}
    if lost := [full for full in lost if full not in unstored]:
        raise Unfoldable(
            f"{', '.join(lost[:5])}{f' and {len(lost) - 5} more' if len(lost) > 5 else ''}: not in the base's files as "
            f"one floating-point tensor of the model's shape ({type(model).__name__}), which merging does not "
            "translate yet; serve the adapter unmerged"
        )
    return {sources[full][0]: deltas for full, deltas in folds.items() if full not in unstored}


def _laid_out(shard: Shard, dtype: str | None, head: headed.Head) -> list[tuple[Entry, Entry]]:
    """The tensors of the merged shard beside those of the base's: the same, or floating-point ones in another type.

    A new head's come under the model's names, without what it replaces.
    """
    laid, at = [], 0
    for entry in shard.entries:
        if entry.name in head.replaced:
            continue
        new = dtype if dtype is not None and entry.dtype in DTYPES else entry.dtype
        size = entry.end - entry.start
        size = size if new == entry.dtype else size // WIDTHS[entry.dtype] * WIDTHS[new]
        name = head.names.get(entry.name, entry.name)
        laid.append((entry, entry._replace(name=name, dtype=new, start=at, end=at + size)))
        at += size
    return laid


def _shard(shard: Shard, target: Path, laid: list[tuple[Entry, Entry]], folds: Folds) -> Iterator[int]:
    """Write one shard, tensors in their order; yields the bytes of each."""
    entries = [new for _, new in laid]
    with shard.path.open("rb") as source, target.open("wb") as out:
        same = list(shard.entries) == entries
        out.write(source.read(shard.data) if same else header(entries, shard.metadata))
        for old, new in laid:
            source.seek(shard.data + old.start)
            if old.start < old.end and (old.name in folds or old.dtype != new.dtype):
                weight = torch.frombuffer(_exactly(source, old), dtype=DTYPES[old.dtype]).reshape(old.shape)
                out.write(_bytes(_folded(new, weight, folds.get(old.name, []))))
            else:
                _copy(source, out, old)
            yield new.end - new.start


def _exactly(source: BinaryIO, entry: Entry) -> bytearray:
    data = bytearray(entry.end - entry.start)
    if source.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise FormatError(f"{entry.name}: its file ended early; it changed while it was read")
    return data


def _copy(source: BinaryIO, out: BinaryIO, entry: Entry) -> None:
    left = entry.end - entry.start
    while left:
        block = source.read(min(BLOCK, left))
        if not block:
            raise FormatError(f"{entry.name}: its file ended early; it changed while it was read")
        out.write(block)
        left -= len(block)


@torch.no_grad()
def _folded(entry: Entry, weight: Tensor, folds: list[Fold]) -> Tensor:
    """Folded in fp32 (fp64 stays fp64) and rounded once, to the type it is stored in."""
    weight = weight if weight.dtype is torch.float64 else weight.float()
    for name, delta in folds:
        weight = delta.fold(name, weight)
    if tuple(weight.shape) != entry.shape:
        raise FormatError(f"{entry.name}: {tuple(weight.shape)} after folding, {entry.shape} before")
    rounded = weight.to(DTYPES[entry.dtype])
    if not torch.isfinite(rounded).all():
        raise FormatError(f"{entry.name}: not finite as {entry.dtype}: the adapter is broken, or the type too narrow")
    return rounded


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _companions(base: Path, target: Path, dtype: str | None, size: int) -> None:
    """Config, tokenizer, template and index, copied; with another type, config and index say so."""
    for pattern in COPIED:
        for file in base.glob(pattern):
            if file.is_file() and not file.name.endswith(".bin.index.json"):
                shutil.copyfile(file, target / file.name)
    if dtype is None:
        return
    _rewrite(
        target / "config.json",
        lambda config: {k: v for k, v in config.items() if k != "torch_dtype"} | {"dtype": dtype},
    )
    if (target / INDEX).is_file():
        _rewrite(target / INDEX, lambda index: index | {"metadata": index.get("metadata", {}) | {"total_size": size}})


def _rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_bytes())), indent=2) + "\n", "utf-8")


@contextmanager
def _aside(output: Path, needed: int) -> Iterator[Path]:
    """A folder to fill, which becomes `output` when all went well and is gone when not."""
    temporary = output.with_name(f"{TEMPORARY}{output.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(temporary).free
        if free < needed:
            raise SaveError(f"--output: {output} needs {needed:,} bytes, {free:,} are free")
        yield temporary
        publish(temporary, output)
    except OSError as error:
        raise SaveError(f"{output} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
