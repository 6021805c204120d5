"""The order is a pure function, and its place one integer."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from peftctl.data.order import Buckets, examples, order, split

SMALL = st.integers(1, 30)


@given(SMALL, st.integers(0, 2**63), st.integers(0, 100))
def test_an_epoch_is_a_permutation(n, seed, epoch):
    assert sorted(order(n, seed, epoch)) == list(range(n))
    assert order(n, seed, epoch) == order(n, seed, epoch)


def test_the_order_never_changes_between_versions():
    assert order(10, 0, 0) == [2, 1, 3, 5, 9, 6, 4, 8, 0, 7]
    assert order(10, 0, 1) != order(10, 0, 0) != order(10, 1, 0)


@given(SMALL, st.lists(st.integers(0, 40), max_size=6), st.integers(0, 9))
def test_any_cuts_give_the_same_stream(n, counts, seed):
    stream, position = [], 0
    for count in counts:
        stream += examples(position, count, n, seed)
        position += count
    assert stream == [i for epoch in range(position // n + 1) for i in order(n, seed, epoch)][:position]


BUCKETS = st.builds(Buckets, st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 7), st.integers(1, 4))


@given(BUCKETS, st.lists(st.integers(0, 40), max_size=6), st.integers(0, 9))
def test_bucketed_epochs_are_permutations_and_may_be_cut_anywhere(buckets, counts, seed):
    n, end = len(buckets.sizes), sum(counts)
    whole = examples(0, end + n, n, seed, buckets)
    for epoch in range(end // n + 1):
        assert sorted(whole[epoch * n : (epoch + 1) * n]) == list(range(n))
    stream: list[int] = []
    for count in counts:
        stream += examples(len(stream), count, n, seed, buckets)
    assert stream == whole[:end]
    again = Buckets(list(buckets.sizes), buckets.step, buckets.steps)
    assert examples(0, end, n, seed, again) == stream


@given(BUCKETS, st.integers(0, 9))
@example(Buckets([7 * i % 13 for i in range(13)], 4, 2), 0)
def test_steps_that_span_two_epochs_stay_as_shuffled(buckets, seed):
    n, step = len(buckets.sizes), buckets.step
    for start in range(0, 4 * n, step):
        if start // n < (start + step - 1) // n:
            assert examples(start, step, n, seed, buckets) == examples(start, step, n, seed)


def test_a_bucket_of_one_step_changes_nothing():
    sizes = [7, 1, 5, 3, 9, 2, 8, 4, 6, 10, 12]
    for seed in range(5):
        assert examples(0, 40, 11, seed, Buckets(sizes, 3, 1)) == examples(0, 40, 11, seed)


def test_steps_of_a_bucket_are_of_like_length_and_shuffled():
    sizes = [(7 * i) % 100 for i in range(100)]  # each of 0..99 once
    steps = [examples(start, 5, 100, 0, Buckets(sizes, 5, 20)) for start in range(0, 100, 5)]
    ranges = [sorted(sizes[i] for i in step) for step in steps]
    assert all(found[-1] - found[0] == 4 for found in ranges)
    assert ranges != sorted(ranges) and [[sizes[i] for i in step] for step in steps] != ranges


@given(st.integers(2, 60), st.floats(0.001, 0.999), st.integers(0, 5))
def test_a_split_is_two_parts_of_the_whole(n, fraction, seed):
    train, held = split(n, fraction, seed)
    assert sorted(train + held) == list(range(n)) and train and held
    assert abs(len(held) - n * fraction) <= 1 and (train, held) == split(n, fraction, seed)


def test_all_orders_are_about_equally_likely():
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(1200):
        found = tuple(order(3, seed, 0))
        counts[found] = counts.get(found, 0) + 1
    assert len(counts) == 6 and all(150 < count < 250 for count in counts.values())
