"""Rows that are longer than `data.max_length`: refused, cut at one end, or, of raw text, split into pieces."""

from __future__ import annotations

from collections.abc import Sequence

from peftctl.errors import DataError, NoLabel
from peftctl.row import Row


def fitted(rows: tuple[Row, ...], limit: int, how: str, opening: Sequence[int] = ()) -> list[tuple[Row, ...]]:
    """The rows of an example with at most `limit` tokens each, as one example or, split, as several.

    `how`: `refuse`; `right` cuts the end off; `left` cuts what stands after the tokenizer's `opening` (BOS), of a
    pair's rows the same, and keeps the last answer whole; `split` makes pieces of which each begins with the last token
    of the one before, so that every token but the first is learnt once. Raises DataError with the reason alone.
    """
    longest = max(rows, key=lambda row: len(row.ids))
    size = len(longest.ids)
    if size <= limit:
        return [rows]
    if how == "split":
        return [(_piece(longest, start, limit),) for start in range(0, size - 1, limit - 1)]
    if how == "left":
        return [_left(rows, limit, opening)]
    first = min(map(_first, rows))
    if first >= limit and not rows[0].targets:
        raise NoLabel(f"the prompt alone has {first} tokens, and data.max_length {limit} leaves no answer room")
    if how == "right":
        return [_differing(tuple(_right(row, limit) for row in rows), limit)]
    which = f"the {longest.role} answer's row" if longest.role else "the row"
    raise DataError(f"{which} has {size} tokens, more than data.max_length {limit}; data.truncate may cut it")


def with_room(rows: tuple[Row, ...], room: int, limit: int, how: str, opening: Sequence[int] = ()) -> tuple[Row, ...]:
    """Prompts with room for an answer of so many tokens; `left` cuts what stands after the `opening`.

    Raises DataError where there is no room: the end of a prompt is what is answered, so it is never cut.
    """
    size = max(len(row.ids) for row in rows)
    if size + room <= limit:
        return rows
    if how != "left" or len(opening) + room >= limit:
        raise DataError(
            f"the prompt has {size} tokens, and data.max_length {limit} leaves no room for an answer of {room}; raise "
            "it, or let data.truncate: left cut the prompt's start"
        )
    return tuple(_cut(row, len(row.ids) + room - limit, opening) for row in rows)


def _cut(row: Row, over: int, opening: Sequence[int]) -> Row:
    kept = len(opening) if row.ids[: len(opening)] == tuple(opening) else 0
    return row if over <= 0 else _joined(row.part(0, kept), row.part(kept + over, len(row.ids)))


def _piece(row: Row, start: int, limit: int) -> Row:
    piece = row.part(start, start + limit)
    return piece._replace(weights=(0.0, *piece.weights[1:]))


def _right(row: Row, limit: int) -> Row:
    if len(row.ids) <= limit:
        return row
    if row.targets and not any(row.weights[:-1]):  # what is said of the whole row stands at its end, and stays there
        return _joined(row.part(0, limit - 1), row.part(len(row.ids) - 1, len(row.ids)))
    return row.part(0, limit)


def _differing(rows: tuple[Row, ...], limit: int) -> tuple[Row, ...]:
    """The rows, of which a pair's must still differ."""
    if len(rows) > len({row.ids for row in rows}):
        raise DataError(f"chosen and rejected are the same up to data.max_length {limit}; a pair must differ")
    return rows


def _left(rows: tuple[Row, ...], limit: int, opening: Sequence[int]) -> tuple[Row, ...]:
    """The rows without the tokens that are too many; what a pair's rows have in common stays common."""
    longest = max(len(row.ids) for row in rows)
    over = longest - limit
    kept = len(opening) if all(row.ids[: len(opening)] == tuple(opening) for row in rows) else 0
    start = _answer(rows[0]) if len(rows) == 1 else min(map(_first, rows))
    if over > start - max(kept, 1):  # a label at the first token would be none
        raise DataError(
            f"the answer alone has {longest - start} tokens, for which data.max_length {limit} leaves no room"
        )
    return tuple(_joined(row.part(0, kept), row.part(kept + over, len(row.ids))) for row in rows)


def _first(row: Row) -> int:
    """Where the labels begin; a label at the first token is none, as nothing predicts it."""
    return next((k for k, weight in enumerate(row.weights) if weight and (k or row.targets)), len(row.ids))


def _answer(row: Row) -> int:
    """Where the last run of labels begins."""
    end = max(k for k, weight in enumerate(row.weights) if weight)
    return next((k + 1 for k in range(end, -1, -1) if not row.weights[k]), 0)


def _joined(before: Row, after: Row) -> Row:
    both = {name: getattr(before, name) + getattr(after, name) for name in ("ids", "weights", "targets", "types")}
    return after._replace(**both)
