"""Several processes that train one adapter: each computes some of a step's micro-batches, then gradients are added.

A step has the same examples however many processes there are. What passes between them is tensors and JSON; nothing is
pickled. The first process leads: it alone writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from peftctl.errors import InputError, TrainingError

MEETING = 60.0  # seconds that the processes have to find each other
ANSWER = 3600.0  # seconds that one waits for another: the leader may be filling a cache


class World:
    """One process of a run. Alone, everything here answers at once."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def owns(self, place: int) -> bool:
        """Whether something that all processes know, by its place in their common order, is this one's to compute."""
        return place % self.size == self.rank

    def seed(self, seed: int, step: int) -> None:
        """Before a step of several processes: each draws its dropout by itself, and a resumed run draws it again."""
        if self.size > 1:
            own = hashlib.sha256(f"{seed} {step} {self.rank} {self.size}".encode()).digest()
            torch.manual_seed(int.from_bytes(own[:7], "big"))
            random.seed(own)

    def gather(self, document: Any) -> list[Any]:
        """What each process says, in order of rank; JSON that may hold NaN. Raises TrainingError if one is gone."""
        if self.size == 1:
            return [document]
        own = torch.frombuffer(bytearray(json.dumps(document).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        with self._answered():
            torch.distributed.all_gather(sizes, torch.tensor([len(own)]))
        padded = own.new_zeros(int(max(sizes)))
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with self._answered():
            torch.distributed.all_gather(parts, padded)
        return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]

    def first(self, answer: int | None) -> int | None:
        """One answer for all: the first that is not None, in order of rank."""
        return next((found for found in self.gather(answer) if found is not None), None)

    def add_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Every process' gradients become the sum over all of them; one that nobody has stays None."""
        if self.size == 1:
            return
        had = self.gather([p.grad is not None for p in parameters.values()])
        wanted = [p for p, flags in zip(parameters.values(), zip(*had, strict=True), strict=True) if any(flags)]
        if not wanted:
            return
        # one buffer, so that it is one message
        whole = torch.cat([_gradient(p).flatten() for p in wanted])
        with self._answered():
            torch.distributed.all_reduce(whole)
        for parameter, part in zip(wanted, whole.split_with_sizes([p.numel() for p in wanted]), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)

    @contextmanager
    def _answered(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            said = str(error).strip().splitlines()[0][:160]
            raise TrainingError(
                f"process {self.rank} of {self.size}: another process of this run is gone ({said}); "
                "--resume goes on from the newest checkpoint"
            ) from error


ALONE = World()


def _gradient(parameter: Tensor) -> Tensor:
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros_like(parameter, dtype=wide) if parameter.grad is None else parameter.grad.to(wide)


@contextmanager
def joined(seconds: float = MEETING) -> Iterator[World]:
    """The world that the environment describes, as torchrun and `launch` do; ALONE where it describes none.

    Raises InputError for an environment that makes no sense, TrainingError when the others are not found.
    """
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    if size is None or size == 1:
        yield ALONE
        return
    if rank is None or not 0 <= rank < size:
        raise InputError(f"WORLD_SIZE is {size} and RANK {rank}: start through --nproc or torchrun, which set both")
    _meet(rank, size, seconds)
    try:
        yield World(rank, size)
    finally:
        torch.distributed.destroy_process_group()


def _meet(rank: int, size: int, seconds: float) -> None:
    address = f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{_number('MASTER_PORT') or 29500}"
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank())
    host, port = address.rsplit(":", 1)
    try:
        store = TCPStore(host, int(port), size, rank == 0, timedelta(seconds=seconds))
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=ANSWER),
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise TrainingError(
            f"process {rank} of {size} found no other at {address} within {seconds:g} s: "
            "see that MASTER_ADDR and MASTER_PORT name the first process and that it runs"
        ) from error


def local_rank() -> int:
    """Which of this machine's devices is ours."""
    return _number("LOCAL_RANK") or 0


def _number(name: str) -> int | None:
    value = os.environ.get(name, "").strip()
    if value and not value.isdecimal():
        raise InputError(f"{name} is {value!r} in the environment, which is no number: unset it, or start by --nproc")
    return int(value) if value else None
