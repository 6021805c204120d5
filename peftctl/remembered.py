"""The reference's log-probabilities, kept across epochs and runs: they are the same at every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from peftctl import base as bases
from peftctl.batch import Batch, build
from peftctl.data.batches import Batches
from peftctl.kept import Groups, Kept, Notice, fingerprint, place, rows_key
from peftctl.policy import Reference
from peftctl.row import Row
from peftctl.surgery import device_of

GROUP = 4096  # tokens that are computed together


class Remembered(Kept):
    """The fp32 log-probability of every label of a run's rows."""

    what = "the reference's log-probabilities are"

    def __init__(self, reference: Reference, groups: Groups, share: str, trim: bool, folder: Path) -> None:
        self.reference, self.share, self.trim = reference, share, trim
        super().__init__(groups, [sum(map(_labels, group)) for group in groups], (), torch.float32, folder)

    def computed(self, rows: Sequence[Row]) -> bytes:
        batch = build(rows, share=self.share, trim=self.trim).to(device_of(self.reference.policy.model))
        logprob = self.reference.tokens(batch).logprob.cpu()
        return logprob.view(torch.uint8).numpy().tobytes()

    @contextmanager
    def served(self) -> Iterator[None]:
        """Within it, the reference remembers its answers about batches whose rows are all kept."""
        everything = self.answers()
        if everything is None:
            yield
            return
        known, start = dict[tuple[object, ...], Tensor](), 0
        for row in (row for group in self.groups for row in group):
            known[row.ids, row.weights] = everything[start : start + _labels(row)]
            start += _labels(row)

        def asked(batch: Batch) -> Tensor | None:
            found = [known.get((row.ids, row.weights)) for row in batch.rows]  # labels stand in the order of the rows
            there = [logprob for logprob in found if logprob is not None]
            return torch.cat(there).to(batch.ids.device) if len(there) == len(found) else None

        self.reference.known = asked
        try:
            yield
        finally:
            self.reference.known = lambda batch: None


def _labels(row: Row) -> int:
    return sum(map(bool, row.weights[1:]))


def plan(
    reference: Reference,
    batches: Batches,
    steps: int,
    base: bases.Base,
    *,
    fused: bool,
    chosen: bool | None,
    notice: Notice,
) -> Remembered | None:
    """What to keep, None where it does not pay or there is no room.

    `chosen`: whether the run remembered when it began; None for a fresh run.
    """
    if chosen is False or (chosen is None and batches.passes(steps) <= 1):
        return None  # whatever other runs have kept: the same recipe is to give the same bits
    policy, share = reference.policy, "all" if batches.share else "none"
    groups = batches.groups(GROUP)
    weights = dict(policy.model.state_dict())
    if reference.initial is not None:
        weights |= {f"reference {n}": t for n, t in (policy.attachment.tensors() | reference.initial).items()}
    exact = policy.head is not None and policy.head.frozen.wide is not None
    facts = fingerprint(policy, base, weights.items(), fused, exact, batches.trim)
    folder = place("references", rows_key(groups, share), facts)
    remembered = Remembered(reference, groups, share, batches.trim, folder)
    fault = remembered.crowded()
    if fault is not None:
        notice(f"{remembered.what} computed at every step: {fault}")
        return None
    return remembered
