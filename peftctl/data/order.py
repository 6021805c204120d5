"""The order in which examples are seen: pure functions of (n, seed, epoch), the same on every machine and Python.

The place in a run is one integer, the number of examples consumed from the endless concatenation of epochs.
"""

from __future__ import annotations

from functools import lru_cache
from random import Random

SPLIT = -1  # the epoch whose order chooses the held-out rows


def order(n: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(n)."""
    return list(_order(n, seed, epoch))


@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    # Fisher-Yates by hand: `random()` of a string seed is promised to stay the same, `shuffle` is not
    random = Random(f"peftctl order, seed {seed}, epoch {epoch}")
    items = list(range(n))
    for last in range(n - 1, 0, -1):
        other = int(random.random() * (last + 1))
        items[last], items[other] = items[other], items[last]
    return tuple(items)


def examples(position: int, count: int, n: int, seed: int) -> list[int]:
    """The `count` examples from `position` on, of the endless concatenation of the epochs of `n` examples."""
    chosen: list[int] = []
    while len(chosen) < count:
        epoch, start = divmod(position + len(chosen), n)
        chosen += _order(n, seed, epoch)[start : start + count - len(chosen)]
    return chosen


def split(n: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Train and held-out indices, each ascending; n * fraction held out, but at least one on either side. n >= 2."""
    held = min(max(1, round(n * fraction)), n - 1)
    chosen = order(n, seed, SPLIT)
    return sorted(chosen[held:]), sorted(chosen[:held])
