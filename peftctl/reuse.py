"""What the frozen blocks answer, kept across epochs and runs: whether that pays, computed once, passed over then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from peftctl import base as bases
from peftctl.checkpoint import random_state, restore_random
from peftctl.data.batches import Batches
from peftctl.frozen import Frozen, evaluating, find
from peftctl.kept import Groups, Kept, Notice, fingerprint, place, rows_key
from peftctl.policy import Policy
from peftctl.row import Row

GROUP = 4096  # tokens that are computed together


class Reuse(Kept):
    """The hidden states that the frozen blocks of a run answer."""

    def __init__(self, frozen: Frozen, groups: Groups, share: str, folder: Path) -> None:
        with evaluating(frozen.policy):
            sample = frozen.answers(groups[0][:1])[0]
        self.frozen = frozen
        self.share = share
        self.what = f"the lower {frozen.count} of {len(frozen.paths)} blocks are"
        counts = [sum(len(row.ids) for row in group) for group in groups]
        super().__init__(groups, counts, (sample.shape[1],), sample.dtype, folder)

    def computed(self, rows: Sequence[Row]) -> bytes:
        with evaluating(self.frozen.policy):
            states = torch.cat(self.frozen.answers(rows, self.share)).cpu()
        return states.view(torch.uint8).numpy().tobytes()

    @contextmanager
    def served(self) -> Iterator[None]:
        """Within it, the policy passes over the frozen blocks where all of a batch's rows are kept."""
        states = self.answers()
        if states is None:
            yield
            return
        places, start = dict[object, int](), 0
        for row in (row for group in self.groups for row in group):
            places[row.ids, row.types] = start
            start += len(row.ids)

        def known(row: Row) -> Tensor | None:
            place = places.get((row.ids, row.types))
            return None if place is None else states[place : place + len(row.ids)]

        with self.frozen.passed_over(known):
            yield


def plan(
    policy: Policy, batches: Batches, steps: int, base: bases.Base, *, fused: bool, chosen: int | None, notice: Notice
) -> Reuse | None:
    """What to keep, None where that is not possible or does not pay; the random state is left as it was.

    `fused`: whether the policy's kernels are the fast ones. `chosen`: the number of blocks that the run passed over
    when it began, 0 for none; None for a fresh run.
    """
    if chosen == 0 or (chosen is None and batches.passes(steps) <= 1):
        return None  # whatever other runs have kept: the same recipe is to give the same bits
    state = random_state()
    try:
        frozen = find(policy, batches.train.rows([0])[0])
        if frozen is None:
            return None
        groups, share = batches.groups(GROUP), "all" if batches.share else "none"
        facts = fingerprint(policy, base, frozen.weights(), fused, frozen.count)
        reuse = Reuse(frozen, groups, share, place("frozen", rows_key(groups, share), facts))
        fault = frozen.fault(groups[0][:2]) or reuse.crowded()
    finally:
        restore_random(state)
    if fault is not None:
        notice(f"{reuse.what} computed at every step: {fault}")
        return None
    return reuse
