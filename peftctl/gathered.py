"""What micro-batches came to, those of all processes together: losses and metrics by their sums and counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from peftctl.distributed import World
from peftctl.objectives.base import Loss

Predictions = tuple[list[Any], list[Any]]  # what was said, and what is true: numbers or texts


class Told(NamedTuple):
    """What a micro-batch's loss came to: each term's coefficient and sum, each metric's sum and count, predictions."""

    terms: list[tuple[float, float]]
    metrics: dict[str, tuple[float, float]]
    predictions: Predictions


def gathered(losses: Mapping[int, Loss], world: World) -> list[Told]:
    """The losses of all processes, in the order of the micro-batches."""
    own = [
        (
            place,
            [(term.coefficient, float(term.sum)) for term in loss.terms],
            {name: (float(s), float(n)) for name, (s, n) in loss.metrics.items()},
            ([], []) if loss.predictions is None else tuple(map(_listed, loss.predictions)),
        )
        for place, loss in losses.items()
    ]
    return [Told(*rest) for _, *rest in sorted(chain.from_iterable(world.gather(own)), key=itemgetter(0))]


def _listed(values: Tensor | Sequence[str]) -> list[Any]:
    return values.tolist() if isinstance(values, Tensor) else list(values)


def sums(weights: Sequence[tuple[float, ...]]) -> list[float]:
    """Per term, its weight over all micro-batches."""
    return [sum(column) for column in zip(*weights, strict=True)]


def total(told: Sequence[Told], totals: Sequence[float]) -> float:
    """The loss over micro-batches: each term's sum by its total weight; a term that weighs nothing is left out."""
    value = 0.0
    for terms, weight in zip(zip(*(one.terms for one in told), strict=True), totals, strict=True):
        value += terms[0][0] * sum(own for _, own in terms) / weight if weight else 0.0
    return value


def average(told: Sequence[Told]) -> dict[str, float]:
    """Metrics over micro-batches, by (sum, count); one that counted nothing is left out."""
    names = dict.fromkeys(name for one in told for name in one.metrics)
    found = {}
    for name in names:
        pairs = [one.metrics[name] for one in told if name in one.metrics]
        count = sum(n for _, n in pairs)
        if count:
            found[name] = sum(s for s, _ in pairs) / count
    return found
