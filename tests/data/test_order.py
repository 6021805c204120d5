"""The order is a pure function, and its place one integer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peftctl.data.order import examples, order, split

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
