"""The batches of a run: a step's examples by its position, as forests."""

from __future__ import annotations

from collections.abc import Iterator

from peftctl.batch import Batch, build
from peftctl.data.dataset import Dataset, every
from peftctl.data.order import examples


class Batches:
    """Micro-batches for each optimizer step. The place is one integer: the examples consumed so far.

    `total`: examples after which the run ends; None for no end. `share`: whether what rows share at their start is
    computed once.
    """

    def __init__(
        self,
        train: Dataset,
        *,
        batch_size: int,
        gradient_accumulation: int = 1,
        seed: int = 0,
        share: bool = True,
        total: int | None = None,
        validation: Dataset | None = None,
    ) -> None:
        self.train = train
        self.validation = validation
        self.batch_size = batch_size
        self.per_step = batch_size * gradient_accumulation
        self.seed = seed
        self.share = "all" if share else "none"
        self.total = total

    def step(self, position: int) -> tuple[list[Batch], int]:
        """The micro-batches of the step at `position`, and the position after it. The last step may be smaller, and
        after it there is none: an empty list."""
        count = self.per_step if self.total is None else max(0, min(self.per_step, self.total - position))
        chosen = examples(position, count, len(self.train), self.seed)
        parts = [chosen[start : start + self.batch_size] for start in range(0, count, self.batch_size)]
        return [build(self.train.rows(part), share=self.share) for part in parts], position + count

    def evaluation(self, batch_size: int | None = None) -> Iterator[Batch]:
        """The held-out examples in order; nothing when there are none."""
        if self.validation is not None:
            yield from in_order(self.validation, batch_size or self.batch_size, self.share == "all")


def in_order(dataset: Dataset, batch_size: int, share: bool = True) -> Iterator[Batch]:
    """All examples of a dataset in order, each once."""
    for rows in every(dataset, batch_size):
        yield build(rows, share="all" if share else "none")
