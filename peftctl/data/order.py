"""The order in which examples are seen: pure functions of (n, seed, epoch), the same on every machine and Python.

The place in a run is one integer, the number of examples consumed from the endless concatenation of epochs. Where rows
of like length are to meet in one optimizer step, the order depends on their lengths as well.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from random import Random
from typing import NamedTuple, TypeVar

SPLIT = -1  # the epoch whose order chooses the held-out rows
PAIRED = -2  # the epoch whose order chooses whose answer an example gets besides its own

T = TypeVar("T")


class Mix(NamedTuple):
    """Several sources whose examples follow each other: of each how many there are, and how many an epoch has.

    A source is gone through in orders of its own, from where the epoch before stopped: one that has fewer in an epoch
    than there are gets through all of them in time, and one that has more repeats none before all others have come.
    """

    sizes: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, eq=False)  # told apart by identity: to compare all sizes at every step would be slow
class Buckets:
    """Which optimizer steps are regrouped by length: `steps` at a time, of `step` examples each."""

    sizes: Sequence[int]  # of each example, in tokens
    step: int
    steps: int


def order(n: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(n)."""
    return list(_order(n, seed, epoch))


@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> array[int]:
    return array("L", shuffled(range(n), f"peftctl order, seed {seed}, epoch {epoch}"))


@lru_cache(maxsize=4)
def _mixed(mix: Mix, seed: int, epoch: int) -> array[int]:
    """An epoch of several sources: examples of each, shuffled together."""
    chosen: list[int] = []
    for part, (size, count) in enumerate(zip(mix.sizes, mix.counts, strict=True)):
        before = sum(mix.sizes[:part])
        own = _stretch(epoch * count, count, size, partial(_own, size, seed, part))
        chosen += (before + one for one in own)
    return array("L", shuffled(chosen, f"peftctl mix, seed {seed}, epoch {epoch}"))


@lru_cache(maxsize=16)
def _own(n: int, seed: int, part: int, epoch: int) -> array[int]:
    return array("L", shuffled(range(n), f"peftctl order, seed {seed}, source {part}, epoch {epoch}"))


def _stretch(position: int, count: int, n: int, order: Callable[[int], Sequence[int]]) -> list[int]:
    """`count` items from `position` on, of the endless concatenation of orders of n items, by epoch."""
    chosen: list[int] = []
    while len(chosen) < count:
        epoch, start = divmod(position + len(chosen), n)
        chosen += order(epoch)[start : start + count - len(chosen)]
    return chosen


def shuffled(items: Iterable[T], name: str) -> list[T]:
    """The items in an order that the name alone decides."""
    # Fisher-Yates by hand: `random()` of a string seed is promised to stay the same, `shuffle` is not
    random, mixed = Random(name), list(items)
    for last in range(len(mixed) - 1, 0, -1):
        other = int(random.random() * (last + 1))
        mixed[last], mixed[other] = mixed[other], mixed[last]
    return mixed


@lru_cache(maxsize=4)
def _bucketed(buckets: Buckets, seed: int, epoch: int, mix: Mix | None) -> array[int]:
    """An epoch's examples in another order. What belongs to a step that spans two epochs stays where it is."""
    n, step = len(buckets.sizes), buckets.step
    items = list(_order(n, seed, epoch) if mix is None else _mixed(mix, seed, epoch))
    first = -epoch * n % step  # where the first step begins that lies wholly in this epoch
    end = first + (n - first) // step * step
    for start in range(first, end, step * buckets.steps):
        stop = min(start + step * buckets.steps, end)
        name = f"peftctl buckets, seed {seed}, epoch {epoch}, from {start}"
        items[start:stop] = regrouped(items[start:stop], buckets, name)
    return array("L", items)


def regrouped(items: Sequence[int], buckets: Buckets, name: str) -> list[int]:
    """The examples of some steps: sorted by length, cut into steps, and the steps shuffled."""
    places = sorted(range(len(items)), key=lambda place: buckets.sizes[items[place]])
    # within a step as shuffled: where the last step of a run is cut short, the short rows must not be what is left
    steps = [sorted(places[start : start + buckets.step]) for start in range(0, len(items), buckets.step)]
    return [items[place] for step in shuffled(steps, name) for place in step]


def dealt(weights: Sequence[float], total: int) -> list[int]:
    """So many in all, dealt out by weight: the largest remainders round up."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    largest = sorted(range(len(exact)), key=lambda part: (counts[part] - exact[part], part))
    for part in largest[: total - sum(counts)]:
        counts[part] += 1
    return counts


def examples(
    position: int, count: int, n: int, seed: int, buckets: Buckets | None = None, mix: Mix | None = None
) -> list[int]:
    """The `count` examples from `position` on, of the endless concatenation of the epochs, which have n examples."""

    def epoch(number: int) -> Sequence[int]:
        if buckets is not None:
            return _bucketed(buckets, seed, number, mix)
        return _order(n, seed, number) if mix is None else _mixed(mix, seed, number)

    return _stretch(position, count, n, epoch)


def split(n: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Train and held-out indices, each ascending; n * fraction held out, but at least one on either side. n >= 2."""
    held = min(max(1, round(n * fraction)), n - 1)
    chosen = order(n, seed, SPLIT)
    return sorted(chosen[held:]), sorted(chosen[:held])
