"""How much arithmetic a step needs at least, and how fast this machine multiplies matrices of these shapes.

Their quotient is the time that a step would take if it did nothing else and lost nothing. Usage:
python -m tests.benchmarks.roofline RECIPE --set KEY=VALUE ... prints it as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import torch

from peftctl import compute
from peftctl import model as models
from peftctl.batch import Batch
from peftctl.kernels.matrix import Matrix, matrix, packable
from peftctl.skeleton import LINEAR, Skeleton, layer_of
from tests.benchmarks.job import prepared

REPEATS = 7
LEAST = 0.02  # seconds that a timing takes, so that the clock's grain does not show


def shapes(skeleton: Skeleton) -> Counter[tuple[int, int]]:
    """(in, out) of the linears in the blocks, and how many there are of each."""
    inside = [m for m in skeleton.modules if m.kind in LINEAR and layer_of(m.path) is not None]
    return Counter((m.in_features, m.out_features) for m in inside)


def flops(skeleton: Skeleton, batch: Batch) -> int:
    """Operations that forward and backward over a frozen base need; the adapter's own, a few per cent, left out.

    A linear costs 2 for each weight and token, and the same again for the gradient of its input; its weight has none.
    The head runs at labels alone. A token sees itself and what is before it: for each such pair a head has two dot
    products of head_dim forward and four backward.
    """
    dimensions = skeleton.dimensions
    blocks = sum(i * o * count for (i, o), count in shapes(skeleton).items())
    pairs = int((batch.positions + 1).sum())
    linears = 4 * blocks * len(batch)
    head = 4 * dimensions.hidden * dimensions.vocabulary * len(batch.labels.target)
    return linears + head + 12 * dimensions.layers * dimensions.heads * dimensions.head_dim * pairs


def gemm_rate(skeleton: Skeleton, tokens: int, dtype: torch.dtype, device: str) -> float:
    """Operations a second of `tokens` rows through each of the blocks' linears, as often as the model has them."""
    found = shapes(skeleton)
    seconds = sum(count * _best(tokens, shape, dtype, device) for shape, count in found.items())
    return sum(2 * tokens * i * o * count for (i, o), count in found.items()) / seconds


def _best(tokens: int, shape: tuple[int, int], dtype: torch.dtype, device: str) -> float:
    """Seconds of one product: the shortest of several timings, for what disturbs a timing makes it longer.

    As torch multiplies by itself, or with the weight packed where the device has that, whichever is faster.
    """
    x = torch.randn(tokens, shape[0], dtype=dtype, device=device)
    weight = torch.randn(shape[1], shape[0], dtype=dtype, device=device)
    forms = [matrix(weight, pack=pack) for pack in (False, packable(weight))]
    return min(_shortest(x, form) for form in forms)


def _shortest(x: torch.Tensor, form: Matrix) -> float:
    _timed(x, form, 2)  # the first call chooses kernels
    calls = max(1, round(LEAST / max(_timed(x, form, 1), 1e-6)))
    return min(_timed(x, form, calls) for _ in range(REPEATS))


@torch.no_grad()
def _timed(x: torch.Tensor, form: Matrix, calls: int) -> float:
    begun = _now(x)
    for _ in range(calls):
        form.forward(x)
    return (_now(x) - begun) / calls


def _now(x: torch.Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def roofline(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Of each step the operations and the tokens that are computed; the machine's rate."""
    job = prepared(path, overrides)
    skeleton = models.skeleton(job.base)
    computed = [sum(len(batch) for batch in step) for step in job.steps]
    micro_batch = round(median(len(batch) for step in job.steps for batch in step))
    settings = job.recipe.train
    dtype = compute.choose(settings.compute_dtype, getattr(torch, job.recipe.model.dtype), settings.device).dtype
    return {
        "flops": [sum(flops(skeleton, batch) for batch in step) for step in job.steps],
        "computed_tokens": computed,
        "tokens": [sum(batch.real_tokens for batch in step) for step in job.steps],
        "gemm_flops_per_s": gemm_rate(skeleton, micro_batch, dtype, job.recipe.train.device),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[])
    given = parser.parse_args()
    print(json.dumps(roofline(given.recipe, given.set)))
