"""How many triplets there are at a step: all at first, then fewer by a cubic law, then the target (equation 12)."""

from __future__ import annotations

from typing import NamedTuple

from peftctl.errors import InputError
from peftctl.methods.adalora import AdaloraConfig


class Schedule(NamedTuple):
    """Steps count from 1; the first pruning comes after `start`, the last one is at `end`."""

    start: int
    end: int
    interval: int
    first_rank: int
    rank: int

    @classmethod
    def of(cls, config: AdaloraConfig, total: int) -> Schedule:
        """The schedule of a run of `total` steps. Raises InputError when no step is left for pruning."""
        start, final = (_steps(value, total) for value in (config.budget_warmup, config.budget_final))
        end = total - final
        if end <= start:
            raise InputError(
                f"method.budget_warmup and method.budget_final leave none of {total} steps for pruning: lower them"
            )
        return cls(start, end, config.interval, config.first_rank, config.rank)

    def prunes(self, step: int) -> bool:
        return step == self.end or (self.start < step < self.end and (step - self.start) % self.interval == 0)

    def budget(self, step: int, modules: int) -> int:
        """Triplets of all modules together."""
        left = 1 - min(1.0, max(0, step - self.start) / (self.end - self.start))
        return int(modules * (self.rank + (self.first_rank - self.rank) * left**3))


def _steps(value: float, total: int) -> int:
    """A fraction of the steps, rounded down, or a number of them."""
    return int(value * total) if value < 1 else int(value)
