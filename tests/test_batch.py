"""The forest of a micro-batch: every row is found again along its path, and what rows share stands there once."""

from hypothesis import given
from hypothesis import strategies as st

from peftctl.batch import build
from peftctl.row import Row

rows = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple), min_size=1, max_size=6)


def make(ids: tuple[int, ...]) -> Row:
    return Row(ids, tuple(float(i % 2) for i in range(len(ids))))


@given(rows)
def test_every_row_lies_along_its_path(ids: list[tuple[int, ...]]) -> None:
    batch = build([make(i) for i in ids])
    for row, tokens in zip(ids, batch.row_tokens, strict=True):
        assert tuple(batch.ids[tokens].tolist()) == row
        assert batch.positions[tokens].tolist() == list(range(len(row)))


@given(rows)
def test_what_is_shared_stands_there_once(ids: list[tuple[int, ...]]) -> None:
    starts = {row[: k + 1] for row in ids for k in range(len(row))}
    assert len(build([make(i) for i in ids])) == len(starts)


@given(rows)
def test_labels_are_the_rows_own(ids: list[tuple[int, ...]]) -> None:
    expected = [(r, row[k], row[k - 1]) for r, row in enumerate(ids) for k in range(1, len(row)) if k % 2]
    for share in ("all", "none"):
        batch = build([make(i) for i in ids], share)
        labels = batch.labels
        found = zip(labels.row.tolist(), labels.target.tolist(), batch.ids[labels.source].tolist(), strict=True)
        assert list(found) == expected


@given(rows)
def test_unshared_is_one_tree_a_row(ids: list[tuple[int, ...]]) -> None:
    batch = build([make(i) for i in ids]).unshared()
    assert batch.parent.tolist() == [-1] * len(ids)
    assert len(batch) == batch.real_tokens == sum(map(len, ids))
