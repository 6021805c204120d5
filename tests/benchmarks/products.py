"""One linear's products in every way that they can be taken: the table behind the choice of the type to compute in.

Usage: python -m tests.benchmarks.products [--threads N] [--rounds N]

Printed are thousand millions of operations a second of the product itself, so that ways which do more besides (widen,
fold) are compared by what they are for. To see a smaller processor's table on a larger one, set
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peftctl import compute
from peftctl.kernels.matrix import matrix
from peftctl.kernels.stored import StoredWeight
from tests.benchmarks.machine import machine

RANK = 16
LEAST = 0.05  # seconds of one timing
SHAPES = (  # out, in, rows
    (1536, 576, 640),
    (576, 1536, 640),
    (576, 576, 640),
    (8192, 2048, 1024),
    (2048, 8192, 256),
    (49152, 576, 176),
    (1536, 576, 1),
    (8192, 2048, 1),
    (49152, 576, 1),
)


class Case(NamedTuple):
    """One linear with a low-rank change, its input and the gradient of its output."""

    weight: Tensor  # (out, in), float32
    x: Tensor  # (rows, in)
    grad: Tensor  # (rows, out)
    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)

    @property
    def flops(self) -> int:
        return 2 * self.weight.numel() * len(self.x)


def case(out: int, width: int, rows: int) -> Case:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Case(random(out, width), random(rows, width), random(rows, out), random(RANK, width), random(out, RANK))


def ways(one: Case) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    half = one.weight.bfloat16()
    wide, narrow, stored = matrix(one.weight), matrix(half), matrix(StoredWeight(half, torch.float32))
    x, grad, scratch = one.x.bfloat16(), one.grad.bfloat16(), torch.empty_like(one.weight)

    def another() -> None:
        """Another matrix in the scratch, as in a pass over a model, where no matrix is the one before."""
        matrix(StoredWeight(half[:1], torch.float32)).forward(one.x)

    def widened(times: Callable[[], object]) -> Callable[[], object]:
        return lambda: (another(), times())

    def folded() -> Tensor:
        """The change added to the widened weight, and one product."""
        scratch.copy_(half)
        return F.linear(one.x, scratch.addmm_(one.b, one.a))

    def apart() -> Tensor:
        """The product and the change's two thin ones, the weight widened before."""
        another()
        return stored.forward(one.x).addmm_(F.linear(one.x, one.a), one.b.T)

    return {
        "float32": lambda: wide.forward(one.x),
        "float32 back": lambda: wide.backward(one.grad),
        "bfloat16": lambda: narrow.forward(x),
        "bfloat16 back": lambda: narrow.backward(grad),
        "widen": widened(lambda: stored.forward(one.x)),
        "widen back": widened(lambda: stored.backward(one.grad)),
        "widen, fold": folded,
        "widen, two thin": apart,
    }


@torch.no_grad()
def rate(call: Callable[[], object], flops: int, rounds: int) -> float:
    """Operations a second, the median of some timings."""
    call()
    begun = time.perf_counter()
    call()
    calls = max(1, round(LEAST / max(time.perf_counter() - begun, 1e-6)))
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        seconds.append((time.perf_counter() - begun) / calls)
    return flops / median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(machine(given.threads))
    choice = compute.choose("auto", torch.bfloat16, "cpu")
    print(f"weights stored in bfloat16 are computed in {str(choice.dtype).removeprefix('torch.')}\n")
    names = list(ways(case(8, 8, 8)))
    print("| out x in, rows | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for shape in SHAPES:
        one = case(*shape)
        rates = [rate(call, one.flops, given.rounds) for call in ways(one).values()]
        print(
            "| {} x {}, {} | ".format(*shape) + " | ".join(f"{found / 1e9:.1f}" for found in rates) + " |", flush=True
        )


if __name__ == "__main__":
    main()
