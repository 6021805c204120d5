"""The batches of a run: a step's examples by its position, put together by their sizes, as forests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from peftctl.batch import Batch, build
from peftctl.data import packing
from peftctl.data.encoded import Dataset, Lazy
from peftctl.data.order import Buckets, examples, regrouped
from peftctl.data.stream import Stream
from peftctl.row import Row

EVALUATED = 4096  # tokens of a micro-batch that needs no gradients
PAIRED_TOGETHER = 64  # examples of a stream that get something of each other, at least


class Batches:
    """Micro-batches for each optimizer step. The place is one integer: the examples consumed so far.

    Which examples a step has depends on nothing but the seed (and, with `bucket`, their sizes); how they are cut into
    micro-batches, of `batch_size` examples or of at most `tokens` tokens, changes memory and speed alone.

    `bucket`: steps whose examples are sorted together. `total`: examples after which the run ends; None for no end.
    `share`: whether what rows share at their start is computed once. `padded`: whether rows are laid out as rectangles.
    `trim`: whether a row ends with its last source, which is for causal attention. `ranks`: processes that share a
    step, which is cut into a micro-batch for each where it would have fewer. `stream`: what is trained on in place of
    `train`; the place then counts the rows of the source and, where several steps are taken together, these steps.
    """

    def __init__(
        self,
        train: Dataset,
        *,
        batch_size: int,
        gradient_accumulation: int = 1,
        tokens: int | None = None,
        bucket: int | None = None,
        seed: int = 0,
        share: bool = True,
        padded: bool = False,
        trim: bool = False,
        total: int | None = None,
        validation: Dataset | None = None,
        ranks: int = 1,
        stream: Stream | None = None,
    ) -> None:
        self.train = train
        self.validation = validation
        self.batch_size = batch_size
        self.per_step = batch_size * gradient_accumulation
        self.tokens = tokens
        self.bucket = bucket
        self.sizes = train.sizes(padded)
        self.buckets = Buckets(self.sizes, self.per_step, bucket) if bucket is not None else None
        self.seed = seed
        self.share = share
        self.padded = padded
        self.trim = trim
        self.total = total
        self.ranks = ranks
        self.stream = stream
        together = -(-PAIRED_TOGETHER // self.per_step) if stream is not None and stream.pair is not None else 1
        self.group = max(together, bucket or 1)  # steps of a stream that are taken together
        self.taken = lru_cache(maxsize=1)(self._taken)

    def step(self, position: int) -> tuple[list[Batch], int]:
        """The micro-batches of the step at `position`, and the position after it. The last step may be smaller, and
        after it there is none: an empty list."""
        data, chosen, after = self.chosen(position)
        sizes = self.sizes if data is self.train else data.sizes(self.padded)
        parts = self.parts([sizes[index] for index in chosen])
        return [self.built(data.rows([chosen[place] for place in part])) for part in parts], after

    def chosen(self, position: int) -> tuple[Dataset, Sequence[int], int]:
        """A data set, the examples in it that the step at `position` has, and the position after it."""
        if self.stream is not None:
            start, number = divmod(position, self.group)
            data, order, after = self.taken(self.stream, start)
            own = order[number * self.per_step : (number + 1) * self.per_step]
            return data, own, position + 1 if number + 1 < self.group else after * self.group
        count = self.per_step if self.total is None else max(0, min(self.per_step, self.total - position))
        found = examples(position, count, len(self.train), self.seed, self.buckets, self.train.mix)
        return self.train, found, position + len(found)

    def _taken(self, stream: Stream, start: int) -> tuple[Dataset, Sequence[int], int]:
        """What steps that are taken together have: the examples, their order, and the row after them."""
        data, after = stream.take(start, self.per_step * self.group)
        order = list(range(len(data)))
        if self.bucket is not None:
            buckets = Buckets(data.sizes(self.padded), self.per_step, self.bucket)
            name, most = f"peftctl buckets, seed {self.seed}, from row {start}", self.per_step * self.bucket
            order = [i for n in order[::most] for i in regrouped(order[n : n + most], buckets, f"{name}, {n}")]
        return data, order, after

    def built(self, rows: Sequence[Row]) -> Batch:
        return build(rows, share=_share(self.share), trim=self.trim)

    def parts(self, sizes: Sequence[int]) -> packing.Parts:
        """How examples of these sizes are cut into micro-batches."""
        most = max(1, min(self.batch_size, -(-len(sizes) // self.ranks)))
        if self.tokens is None:
            return packing.even(sizes, most, self.padded)
        parts = packing.within(sizes, self.tokens, self.padded)
        return parts if len(parts) >= self.ranks else packing.even(sizes, most, self.padded)

    def passes(self, steps: int) -> float:
        """How often the first steps see each example, on average."""
        seen = steps * self.per_step if self.total is None else min(self.total, steps * self.per_step)
        return seen / len(self.train)

    def groups(self, tokens: int) -> Sequence[list[Row]]:
        """All rows, those of the evaluation too, in groups of at most `tokens`, which depend on the data alone."""
        sets = [self.train] if self.validation is None else [self.train, self.validation]
        parts = [(data, part) for data in sets for part in packing.in_order(data.sizes(), tokens)]
        return Lazy(len(parts), lambda index: parts[index][0].rows(parts[index][1]))

    def evaluation(self) -> Iterator[Batch]:
        """The held-out examples; nothing when there are none."""
        if self.validation is not None:
            yield from each_once(self.validation, self.share, self.padded, self.trim)


def each_once(
    dataset: Dataset, share: bool = True, padded: bool = False, trim: bool = False, tokens: int = EVALUATED
) -> Iterator[Batch]:
    """All examples of a dataset, in order unless they are padded; `tokens`: the most in a batch of several."""
    for part in packing.in_order(dataset.sizes(padded), tokens, padded):
        yield build(dataset.rows(part), share=_share(share), trim=trim)


def _share(share: bool) -> str:
    return "all" if share else "none"
