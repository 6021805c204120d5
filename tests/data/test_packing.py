"""However sizes are put together, every example is there once and the bounds hold."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from peftctl.data.packing import even, in_order, within

SIZES = st.lists(st.integers(1, 50), max_size=40)
PADDED = st.booleans()


def cost(sizes, part, padded):
    own = [sizes[i] for i in part]
    return max(own) * len(own) if padded else sum(own)


@given(SIZES, st.integers(1, 9), PADDED)
def test_even_parts_have_their_count(sizes, count, padded):
    parts = even(sizes, count, padded)
    assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
    assert all(part == sorted(part) for part in parts)
    whole, rest = divmod(len(sizes), count)
    assert sorted(map(len, parts), reverse=True) == [count] * whole + [rest] * (rest > 0)


@given(SIZES, st.integers(1, 5))
def test_even_totals_differ_by_no_more_than_the_largest(sizes, parts):
    sizes = sizes[: len(sizes) // parts * parts]
    totals = [sum(sizes[i] for i in part) for part in even(sizes, max(1, len(sizes) // parts))]
    assert max(totals, default=0) - min(totals, default=0) <= max(sizes, default=0)


def test_even_parts_by_hand():
    assert even([9, 8, 1, 2], 2) == [[0, 2], [1, 3]]
    assert even([9, 8, 1, 2], 2, padded=True) == [[0, 1], [2, 3]]
    assert even([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]
    assert even([1, 2, 3], 3) == [[0, 1, 2]] and even([], 3) == []


@given(SIZES, st.integers(1, 120), PADDED)
def test_a_budget_holds_but_for_what_stands_alone(sizes, tokens, padded):
    for parts in (within(sizes, tokens, padded), in_order(sizes, tokens, padded)):
        assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
        assert all(len(part) == 1 or cost(sizes, part, padded) <= tokens for part in parts)


@given(SIZES, st.integers(50, 120))
def test_first_fit_leaves_no_two_parts_that_fit_in_one(sizes, tokens):
    parts = within(sizes, tokens)
    totals = sorted(cost(sizes, part, False) for part in parts)
    assert len(totals) < 2 or totals[0] + totals[1] > tokens
    assert within([6, 4, 5, 5, 11], 10) == [[4], [0, 1], [2, 3]]


@given(SIZES, st.integers(1, 120))
def test_neighbours_stay_in_order_and_fill_the_budget(sizes, tokens):
    parts = in_order(sizes, tokens)
    assert [i for part in parts for i in part] == list(range(len(sizes)))
    assert all(cost(sizes, [*part, after[0]], False) > tokens for part, after in pairwise(parts))
    assert in_order([1, 9, 1, 9], 18, padded=True) == [[1, 3], [0, 2]]
