"""A step's micro-batches are a function of the position; cut anywhere, the stream is the same."""

from __future__ import annotations

import pytest

from peftctl.data.batches import Batches, in_order
from peftctl.data.dataset import Dataset
from peftctl.data.order import examples
from peftctl.row import Row


def dataset(n: int, pairs: bool = False) -> Dataset:
    roles = ("chosen", "rejected") if pairs else ("",)
    rows = [
        tuple(Row((1, 2, i + 10, k), (0.0, 0.0, 1.0, 1.0), i, role) for k, role in enumerate(roles)) for i in range(n)
    ]
    return Dataset("d", tuple(rows), tuple(f"d:{i}" for i in range(n)), "")


def seen(batches: Batches, position: int = 0, steps: int = 100) -> tuple[list[list[tuple[int, ...]]], int]:
    out = []
    for _ in range(steps):
        parts, position = batches.step(position)
        if not parts:
            break
        out.append([part.examples for part in parts])
    return out, position


def test_steps_follow_the_order_and_end_at_the_total():
    batches = Batches(dataset(7), batch_size=2, gradient_accumulation=2, seed=3, total=14)
    steps, position = seen(batches)
    assert [[len(part) for part in step] for step in steps] == [[2, 2], [2, 2], [2, 2], [2]]
    assert [i for step in steps for part in step for i in part] == examples(0, 14, 7, 3) and position == 14
    assert batches.step(14) == ([], 14)


def test_resumed_at_any_position_is_the_same():
    batches = Batches(dataset(5), batch_size=2, gradient_accumulation=3, seed=1)
    whole, _ = seen(batches, steps=6)
    for cut in range(6):
        first, position = seen(batches, steps=cut)
        assert first + seen(batches, position, 6 - cut)[0] == whole


def test_accumulation_only_cuts_the_step():
    one = Batches(dataset(9), batch_size=4, seed=1)
    four = Batches(dataset(9), batch_size=1, gradient_accumulation=4, seed=1)
    flat = [[i for part in step for i in part] for step in seen(four, steps=5)[0]]
    assert flat == [list(step[0]) for step in seen(one, steps=5)[0]]


def test_a_dataset_smaller_than_a_batch_repeats():
    parts, position = Batches(dataset(2), batch_size=5).step(0)
    assert len(parts[0].rows) == 5 and position == 5


@pytest.mark.parametrize("share", [True, False])
def test_starts_are_shared_or_not(share):
    parts, _ = Batches(dataset(4, pairs=True), batch_size=4, share=share).step(0)
    assert parts[0].real_tokens == 32
    assert len(parts[0]) == (2 + 4 + 8 if share else 32)
    assert parts[0].roles == ("chosen", "rejected") * 4


def test_evaluation_sees_each_once_in_order():
    batches = Batches(dataset(3), batch_size=2, validation=dataset(5))
    assert [batch.examples for batch in batches.evaluation()] == [(0, 1), (2, 3), (4,)]
    assert [batch.examples for batch in batches.evaluation(4)] == [(0, 1, 2, 3), (4,)]
    assert list(Batches(dataset(3), batch_size=2).evaluation()) == []
    assert [len(batch.rows) for batch in in_order(dataset(2, pairs=True), 1)] == [2, 2]
