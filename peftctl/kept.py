"""Answers about all rows of a run, in fixed groups: computed once, kept on disk across epochs and runs.

Whether they are kept is one of a run's choices: whoever resumes the run does the same, for equal bits.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import mmap
import os
import platform
import sys
import warnings
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from shutil import disk_usage, rmtree

import torch
from torch import Tensor

from peftctl import base as bases
from peftctl.policy import Policy
from peftctl.row import Row
from peftctl.signals import Stop
from peftctl.states import Store
from peftctl.surgery import device_of

LARGEST = 32 << 30  # bytes of all that is kept of a kind; what was used longest ago goes first
# whoever works on these must not get yesterday's answers
CODE = ("batch.py", "frozen.py", "fuse.py", "head.py", "policy.py", "kernels/*.py", "methods/**/*.py")

# safetensors' words
NAMES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}

Notice = Callable[[str], None]
Groups = Sequence[Sequence[Row]]


class Kept:
    """One tensor of all answers. `groups`: what is computed together. `counts`: how many entries each group's answers
    have, of some shape and dtype. `folder`: where they are kept.
    """

    what = ""  # what is computed where nothing is kept, for notices: "the frozen blocks are"

    def __init__(
        self, groups: Groups, counts: Sequence[int], entry: tuple[int, ...], dtype: torch.dtype, folder: Path
    ) -> None:
        self.groups, self.dtype, self.shape = groups, dtype, (sum(counts), *entry)
        size = math.prod(entry) * dtype.itemsize  # bytes
        self.store = Store(folder, [count * size for count in counts], NAMES[dtype], self.shape)
        self.missing = self.store.missing()
        self.content: mmap.mmap | None = None  # all answers, once they are there

    def computed(self, rows: Sequence[Row]) -> bytes:
        """The answers about one group."""
        raise NotImplementedError

    def fill(self, stop: Stop, notice: Notice) -> bool:
        """Compute what is missing; whether that could be written. Asked to stop, it ends early, and nothing is used."""
        try:
            if self.missing:
                notice(f"{self.what} computed once for all rows ({self.needed:,} bytes in {self.store.folder.parent})")
            for group in self.missing:
                if stop() is not None:
                    return True
                self.store.write(group, self.computed(self.groups[group]))
            self.content = self.store.mapped()
            os.utime(self.store.folder)
        except (OSError, ValueError) as error:
            notice(f"{self.what} computed at every step: {self.store.folder}: {error}")
            return False
        with suppress(OSError):
            _prune(self.store.folder)
        return True

    def answers(self) -> Tensor | None:
        """All of them, read as they are asked for; None before they are there."""
        if self.content is None:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nobody can write to them is as it should be
            whole = torch.frombuffer(self.content, dtype=self.dtype, offset=self.store.starts[0])
        return whole.view(self.shape)

    @property
    def needed(self) -> int:
        """Bytes that are still to be written."""
        return sum(self.store.sizes[group] for group in self.missing)

    def crowded(self) -> str | None:
        """Why there is no room on the disk, of which half of what is free is left to others; None if there is."""
        place = next(parent for parent in self.store.folder.absolute().parents if parent.exists())
        free = disk_usage(place).free
        return None if self.needed <= free // 2 else f"{self.needed:,} bytes needed, {free:,} free at {place}"


def place(kind: str, *keys: str) -> Path:
    """The folder of answers of a kind that depend on these keys."""
    return bases.cache_folder() / kind / hashlib.sha256("".join(keys).encode()).hexdigest()


def fingerprint(
    policy: Policy, base: bases.Base, weights: Iterable[tuple[str, Tensor]], *facts: bool | int | str
) -> str:
    """sha256 of all that answers depend on to the last bit: weights, software, kernels, processor, other facts."""
    device = device_of(policy.model)
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    known = [
        *(bases.fingerprint(base), version("torch"), version("transformers"), _code(policy)),
        *(policy.layout.name, policy.layout.first_position, policy.packed, *facts),
        *(device.type, processor, platform.machine(), sys.byteorder, torch.get_num_threads()),
        torch.get_float32_matmul_precision(),
    ]
    digest = hashlib.sha256(json.dumps(known).encode())
    # the base's fingerprint is of a sample; a mistaken one would spoil a run unseen
    for name, tensor in weights:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def rows_key(groups: Groups, share: str) -> str:
    """sha256 of the rows, their labels and how they are grouped."""
    digest = hashlib.sha256(share.encode())
    for group in groups:
        digest.update(json.dumps([len(row.ids) for row in group]).encode())
        for row in group:
            digest.update(array("q", row.ids).tobytes() + array("d", row.weights).tobytes())
            digest.update(array("q", row.types).tobytes())
    return digest.hexdigest()


def _code(policy: Policy) -> str:
    own = Path(__file__).parent
    files = [file for pattern in CODE for file in sorted(own.glob(pattern))]
    files.append(Path(inspect.getfile(type(policy.model))))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _prune(own: Path) -> None:
    """Drop what was used longest ago beyond what is allowed; one's own stays whatever its size."""
    others = sorted((p for p in own.parent.iterdir() if p != own), key=lambda path: path.stat().st_mtime, reverse=True)
    total = _size(own)
    for path in others:
        total += _size(path)
        if total > LARGEST:
            rmtree(path, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
