"""The streaming merge: shard by shard, one tensor in memory at a time, untouched tensors byte for byte.

Works on the files alone: the model is on the meta device, and only says which names on disk are which modules. What is
one parameter there and several tensors on disk is in memory as a whole, one such parameter at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from peftctl.errors import FormatError, InputError, SaveError, Unfoldable
from peftctl.folding import DTYPES, Folds, changed, folded_shape, folds_of, together
from peftctl.formats import headed, names
from peftctl.formats.copying import copy_range
from peftctl.formats.shards import INDEX, WIDTHS, Entry, Shard, header, shards
from peftctl.formats.vocabularies import TEMPLATES
from peftctl.joined import Joined, joined
from peftctl.methods.attachment import Attachment
from peftctl.storage import TEMPORARY, publish, sync
from peftctl.surgery import new_rows
from peftctl.task import Task

NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
COPIED = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "*.spm",
    "*.vocab",
    "*.bpe",
    "*.codes",
    "*.py",
    "LICENSE*",
)


class Changes(NamedTuple):
    """What changes in the files, by stored name: parameters that are one tensor each, and those in parts."""

    folds: Folds
    joined: dict[str, Joined]


def merge(
    base: Path,
    model: Any,
    attachment: Attachment,
    output: Path,
    *,
    further: Sequence[Attachment] = (),
    dtype: str | None = None,
    task: Task | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    finish: Callable[[Path], object] = lambda folder: None,
) -> None:
    """Write the base's files with the deltas folded in, to a folder that appears when it is whole.

    `further`: other adapters on the same base, whose changes are added.
    `task`: what the model is asked for; the head is written beside what the base's files hold. `progress` gets bytes
    done and bytes in all; `finish` may add files to the folder before it gets its name. Raises Unfoldable, InputError,
    FormatError, SaveError; there is no output then.
    """
    refuse(output, dtype)
    found = shards(base)
    folds = together([folds_of(one, model) for one in (attachment, *further)])
    head = headed.Head() if task is None else headed.new(model, folds, found)
    changes = _on_disk(model, {full: own for full, own in folds.items() if full not in head.tensors}, found)
    laid_out = [_laid_out(shard, dtype and NAMES[dtype], head, changes.folds) for shard in found]
    total, done = sum(laid[-1][1].end for laid in laid_out if laid), 0
    merged = {old.name: new for laid in laid_out for old, new in laid}
    with _aside(output, total + head.size) as temporary, ThreadPoolExecutor(1) as beside:
        synced = []  # while the next one is being written
        for name, shard, laid in zip(head.files(found), found, laid_out, strict=True):
            for size in _shard(shard, temporary / name, laid, changes, merged):
                done += size
                progress(done, total)
            synced.append(beside.submit(sync, temporary / name))
        _companions(base, temporary, dtype, total)
        head.write(temporary, [[new for _, new in laid] for laid in laid_out], found)
        if task is not None:
            _rewrite(temporary / "config.json", lambda config: headed.config(config, task, model))
        if (new := new_rows(model)) is not None:
            _rewrite(temporary / "config.json", lambda config: config | {"vocab_size": new.total})
        finish(temporary)
        for one in synced:
            one.result()


def refuse(output: Path, dtype: str | None) -> None:
    """Refuse what needs no look at the model. Raises InputError."""
    if dtype is not None and dtype not in NAMES:
        raise InputError(f"--dtype: {dtype!r} is none of {', '.join(NAMES)}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"--output: {output} exists already; name another folder or remove it")


def _on_disk(model: Any, folds: Folds, found: list[Shard]) -> Changes:
    """The same under the names that the files use. Raises Unfoldable for a parameter that cannot be found in them."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    places = {entry.name: (shard, entry) for shard in found for entry in shard.entries}
    sources: dict[str, list[str]] = {}
    for name, place in names.parameters(model, places).items():
        entry = places[name][1]
        shape = folded_shape(entry.shape, folds.get(place.parameter, []))
        usable = place.whole and entry.dtype in DTYPES and shape == shapes.get(place.parameter)
        sources.setdefault(place.parameter, []).append(name if usable else "")
    lost = [full for full in folds if len(sources.get(full, [])) != 1 or not sources[full][0]]
    in_parts, served = joined(names.parts(model, places), {full: folds[full] for full in lost}, places, shapes)
    # of a tied parameter, files hold one place or all
    unstored = {full for full in lost if full not in sources and all(f.name in f.delta.mirrors() for f in folds[full])}
    if lost := [full for full in lost if full not in unstored | served]:
        raise Unfoldable(
            f"{', '.join(lost[:5])}{f' and {len(lost) - 5} more' if len(lost) > 5 else ''}: not in the base's files as "
            f"floating-point tensors that transformers' mapping leads to and back from ({type(model).__name__}); "
            "serve the adapter unmerged"
        )
    whole = {sources[full][0]: deltas for full, deltas in folds.items() if full not in unstored | served}
    return Changes(whole, in_parts)


def _laid_out(shard: Shard, dtype: str | None, head: headed.Head, folds: Folds) -> list[tuple[Entry, Entry]]:
    """The tensors of the merged shard beside those of the base's: the same, or floating-point ones in another type.

    A new head's come under the model's names, without what it replaces.
    """
    laid, at = [], 0
    for entry in shard.entries:
        if entry.name in head.replaced:
            continue
        new = dtype if dtype is not None and entry.dtype in DTYPES else entry.dtype
        size, shape = entry.end - entry.start, folded_shape(entry.shape, folds.get(entry.name, []))
        if (new, shape) != (entry.dtype, entry.shape):
            size = prod(shape) * WIDTHS[new]
        name = head.names.get(entry.name, entry.name)
        laid.append((entry, entry._replace(name=name, dtype=new, shape=shape, start=at, end=at + size)))
        at += size
    return laid


def _shard(
    shard: Shard, target: Path, laid: list[tuple[Entry, Entry]], changes: Changes, merged: Mapping[str, Entry]
) -> Iterator[int]:
    """Write one shard, tensors in their order; yields bytes written. `merged`: every new entry by its old name."""
    entries = [new for _, new in laid]
    with shard.path.open("rb") as source, target.open("wb") as out:
        same = list(shard.entries) == entries
        out.write(source.read(shard.data) if same else header(entries, shard.metadata))
        for pairs in _runs(laid, changes):
            (old, new), (last, _) = pairs[0], pairs[-1]
            if old.name in changes.joined:
                out.write(_bytes(changes.joined[old.name].take(old.name, merged)))
            elif _touched(old, new, changes):
                for block in changed(source, shard, (old, new), changes.folds.get(old.name, [])):
                    out.write(_bytes(block))
            else:
                _copy(source, out, old._replace(start=shard.data + old.start, end=shard.data + last.end))
            yield sum(new.end - new.start for _, new in pairs)


def _touched(old: Entry, new: Entry, changes: Changes) -> bool:
    """Whether a tensor's bytes may differ from the base's."""
    if old.name in changes.joined:
        return True
    return old.start < old.end and (old.name in changes.folds or old.dtype != new.dtype)


def _runs(laid: list[tuple[Entry, Entry]], changes: Changes) -> Iterator[list[tuple[Entry, Entry]]]:
    """The tensors of a shard one by one, but those together that are neither touched nor apart in the base's file."""
    run: list[tuple[Entry, Entry]] = []
    for old, new in laid:
        touched = _touched(old, new, changes)
        if run and (touched or run[-1][0].end != old.start):
            yield run
            run = []
        if touched:
            yield [(old, new)]
        else:
            run.append((old, new))
    if run:
        yield run


def _copy(source: BinaryIO, out: BinaryIO, run: Entry) -> None:
    """The bytes of tensors that lie side by side; `run` has the first one's name, and places in the file."""
    size = run.end - run.start
    if copy_range(source, out, run.start, size) < size:
        raise FormatError(f"{run.name}: its file ended early; it changed while it was read")


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _companions(base: Path, target: Path, dtype: str | None, size: int) -> None:
    """Config, tokenizer, template and index, copied; with another type, config and index say so."""
    for pattern in COPIED:
        for file in base.glob(pattern):
            if file.is_file() and not file.name.endswith(".bin.index.json"):
                shutil.copyfile(file, target / file.name)
    if (base / TEMPLATES).is_dir():
        shutil.copytree(base / TEMPLATES, target / TEMPLATES)
    if dtype is not None:
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
