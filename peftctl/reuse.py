"""What the frozen blocks answer, kept across epochs and runs: whether that pays, under what fingerprint, computed once.

Whether it is kept is one of a run's choices: whoever resumes the run does the same, for equal bits.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import sys
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from shutil import disk_usage, rmtree

import torch
from torch import Tensor

from peftctl import base as bases
from peftctl.checkpoint import random_state, restore_random
from peftctl.data.batches import Batches
from peftctl.frozen import Frozen, evaluating, find
from peftctl.policy import Policy
from peftctl.row import Row
from peftctl.signals import Stop
from peftctl.states import Store
from peftctl.surgery import device_of

GROUP = 4096  # tokens that are computed together
LARGEST = 32 << 30  # bytes of all that is kept; what was used longest ago goes first
CODE = ("frozen.py", "fuse.py", "policy.py", "kernels/*.py")  # whoever works on it must not get yesterday's states

Notice = Callable[[str], None]


class Reuse:
    """The frozen blocks of a run, all its rows in fixed groups, and the folder where the answers are kept."""

    def __init__(self, frozen: Frozen, groups: Sequence[Sequence[Row]], share: str, folder: Path) -> None:
        with evaluating(frozen.policy):
            sample = frozen.answers(groups[0][:1])[0]
        self.frozen = frozen
        self.groups = groups
        self.share = share
        self.width, self.dtype = sample.shape[1], sample.dtype
        token = self.width * self.dtype.itemsize  # bytes
        self.store = Store(folder, [sum(len(row.ids) for row in group) * token for group in groups])
        self.missing = self.store.missing()
        self.states: Tensor | None = None  # (tokens, d) of all rows, once they are filled

    def fill(self, stop: Stop, notice: Notice) -> bool:
        """Compute what is missing; whether that could be written. Asked to stop, it ends early, and nothing is used."""
        try:
            if self.missing:
                blocks = f"lower {self.frozen.count} of {len(self.frozen.paths)} blocks"
                notice(
                    f"computing the {blocks} once for all rows ({self.needed:,} bytes in {self.store.folder.parent})"
                )
            for group in self.missing:
                if stop() is not None:
                    return True
                self.store.write(group, self._computed(self.groups[group]))
            content = self.store.mapped()
            os.utime(self.store.folder)
        except (OSError, ValueError) as error:
            notice(f"the frozen blocks are computed at every step: {self.store.folder}: {error}")
            return False
        with suppress(OSError):
            _prune(self.store.folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nobody can write to them is as it should be
            self.states = torch.frombuffer(content, dtype=self.dtype).view(-1, self.width)
        return True

    @property
    def needed(self) -> int:
        """Bytes that are still to be written."""
        return sum(self.store.sizes[group] for group in self.missing)

    @contextmanager
    def served(self) -> Iterator[None]:
        """Within it, the policy passes over the frozen blocks where all of a batch's rows are kept."""
        if self.states is None:
            yield
            return
        states, places, start = self.states, dict[tuple[int, ...], int](), 0
        for row in (row for group in self.groups for row in group):
            places[row.ids] = start
            start += len(row.ids)

        def known(ids: tuple[int, ...]) -> Tensor | None:
            place = places.get(ids)
            return None if place is None else states[place : place + len(ids)]

        with self.frozen.passed_over(known):
            yield

    def _computed(self, rows: Sequence[Row]) -> bytes:
        with evaluating(self.frozen.policy):
            states = torch.cat(self.frozen.answers(rows, self.share)).cpu()
        return states.view(torch.uint8).numpy().tobytes()


def plan(
    policy: Policy, batches: Batches, steps: int, base: bases.Base, *, fused: bool, chosen: int | None, notice: Notice
) -> Reuse | None:
    """What to keep, None where that is not possible or does not pay; the random state is left as it was.

    `fused`: whether the policy's kernels are the fast ones. `chosen`: the number of blocks that the run passed over
    when it began, 0 for none; None for a fresh run.
    """
    if chosen == 0:
        return None
    state = random_state()
    try:
        groups, share = batches.groups(GROUP), "all" if batches.share else "none"
        frozen = find(policy, groups[0][0])
        if frozen is None:
            return None
        key = f"{_data(groups, share)}{fingerprint(frozen, base, fused=fused)}"
        folder = bases.cache_folder() / "frozen" / hashlib.sha256(key.encode()).hexdigest()
        reuse = Reuse(frozen, groups, share, folder)
        if chosen is None and batches.passes(steps) <= 1 and reuse.missing:
            return None
        fault = frozen.fault(groups[0][:2]) or _crowded(reuse)
    finally:
        restore_random(state)
    if fault is not None:
        notice(f"the {frozen.count} frozen blocks are computed at every step: {fault}")
        return None
    return reuse


def fingerprint(frozen: Frozen, base: bases.Base, *, fused: bool) -> str:
    """sha256 of all that a row's states depend on to the last bit: weights, software, kernels, processor."""
    policy = frozen.policy
    device = device_of(policy.model)
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    facts = [
        *(bases.fingerprint(base), version("torch"), version("transformers"), _code(policy)),
        *(frozen.count, policy.layout.name, policy.layout.first_position, fused, policy.packed),
        *(device.type, processor, platform.machine(), sys.byteorder, torch.get_num_threads()),
        torch.get_float32_matmul_precision(),
    ]
    digest = hashlib.sha256(json.dumps(facts).encode())
    # the base's fingerprint is of a sample; a mistaken one would spoil a run unseen
    for name, tensor in frozen.weights():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _data(groups: Sequence[Sequence[Row]], share: str) -> str:
    digest = hashlib.sha256(share.encode())
    for group in groups:
        digest.update(json.dumps([len(row.ids) for row in group]).encode())
        for row in group:
            digest.update(array("q", row.ids).tobytes())
    return digest.hexdigest()


def _code(policy: Policy) -> str:
    own = Path(__file__).parent
    files = [file for pattern in CODE for file in sorted(own.glob(pattern))]
    files.append(Path(inspect.getfile(type(policy.model))))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _crowded(reuse: Reuse) -> str | None:
    """Why there is no room on the disk, of which half of what is free is left to others; None if there is."""
    place = next(parent for parent in reuse.store.folder.absolute().parents if parent.exists())
    free = disk_usage(place).free
    return None if reuse.needed <= free // 2 else f"{reuse.needed:,} bytes needed, {free:,} free at {place}"


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
