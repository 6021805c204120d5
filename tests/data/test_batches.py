"""A step's micro-batches are a function of the position; cut anywhere, the stream is the same."""

from __future__ import annotations

from itertools import cycle

import pytest

from peftctl.data.batches import Batches, each_once
from peftctl.data.encoded import Dataset
from peftctl.data.order import examples
from peftctl.row import Row


def dataset(n: int, pairs: bool = False, more: tuple[int, ...] = (0,)) -> Dataset:
    """Rows of 4 tokens, and of `more` in turn."""
    roles = ("chosen", "rejected") if pairs else ("",)
    rows = [
        tuple(
            Row((1, 2, i + 10, k) + (9,) * extra, (0.0, 0.0, 1.0, 1.0) + (0.0,) * extra, i, role)
            for k, role in enumerate(roles)
        )
        for i, extra in zip(range(n), cycle(more), strict=False)
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
    flat = [sorted(i for part in step for i in part) for step in steps]
    assert flat == [sorted(examples(start, min(4, 14 - start), 7, 3)) for start in range(0, 14, 4)] and position == 14
    assert batches.step(14) == ([], 14)


UNEVEN = (0, 30, 3, 1, 0, 12)
WAYS = [{}, {"bucket": 2}, {"tokens": 20}, {"padded": True}, {"tokens": 40, "bucket": 3, "padded": True}]


@pytest.mark.parametrize("way", WAYS)
def test_resumed_at_any_position_is_the_same(way):
    batches = Batches(dataset(11, more=UNEVEN), batch_size=2, gradient_accumulation=3, seed=1, **way)
    whole, _ = seen(batches, steps=6)
    for cut in range(6):
        first, position = seen(batches, steps=cut)
        again = Batches(dataset(11, more=UNEVEN), batch_size=2, gradient_accumulation=3, seed=1, **way)
        assert first + seen(again, position, 6 - cut)[0] == whole


@pytest.mark.parametrize("way", [way for way in WAYS if "bucket" not in way])
def test_a_step_has_the_same_examples_however_it_is_cut(way):
    one = Batches(dataset(9, more=UNEVEN), batch_size=4, seed=1)
    four = Batches(dataset(9, more=UNEVEN), batch_size=1, gradient_accumulation=4, seed=1, **way)
    flat = [sorted(i for part in step for i in part) for step in seen(four, steps=5)[0]]
    assert flat == [sorted(i for part in step for i in part) for step in seen(one, steps=5)[0]]


def test_without_accumulation_a_step_is_as_shuffled():
    batches = Batches(dataset(9, more=UNEVEN), batch_size=4, seed=1)
    assert [list(step[0]) for step in seen(batches, steps=5)[0]] == [examples(4 * k, 4, 9, 1) for k in range(5)]


def test_micro_batches_are_even_or_of_like_length():
    even = Batches(dataset(8, more=(0, 0, 40, 40)), batch_size=4, gradient_accumulation=2)
    assert [part.real_tokens for part in even.step(0)[0]] == [96, 96]
    alike = Batches(dataset(8, more=(0, 0, 40, 40)), batch_size=4, gradient_accumulation=2, padded=True)
    assert [part.real_tokens for part in alike.step(0)[0]] == [176, 16]


def test_micro_batches_of_so_many_tokens():
    pairs = Batches(dataset(6, pairs=True, more=(0, 30)), batch_size=6, tokens=24)
    parts, position = pairs.step(0)
    assert [part.real_tokens for part in parts] == [68, 68, 68, 24] and position == 6  # pairs are never torn apart
    assert [len(set(part.examples)) for part in parts] == [1, 1, 1, 3]


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
    assert [batch.examples for batch in batches.evaluation()] == [(0, 1, 2, 3, 4)]
    assert [batch.examples for batch in each_once(dataset(5), tokens=11)] == [(0, 1), (2, 3), (4,)]
    assert list(Batches(dataset(3), batch_size=2).evaluation()) == []
    assert [len(batch.rows) for batch in each_once(dataset(2, pairs=True), tokens=1)] == [2, 2]


def test_evaluation_of_rectangles_goes_by_length():
    found = each_once(dataset(4, more=(0, 20)), padded=True, tokens=48)
    assert [batch.examples for batch in found] == [(1, 3), (0, 2)]
