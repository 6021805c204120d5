"""How examples are put together into micro-batches: pure functions of their sizes in tokens.

Each answers parts, lists of indices into `sizes`, every index once and ascending within its part. `padded`: whether a
part is laid out as a rectangle, which costs its largest example's size for every example.
"""

from __future__ import annotations

from collections.abc import Sequence

Parts = list[list[int]]


def even(sizes: Sequence[int], count: int, padded: bool = False) -> Parts:
    """Parts of `count` examples, one of them smaller where they do not go round.

    Of totals as even as comes by putting the largest first, each into the smallest part with room (Graham,
    https://doi.org/10.1137/0117039); of examples of like size where they are padded.
    """
    if padded:
        order = _largest_first(sizes)
        return [sorted(order[start : start + count]) for start in range(0, len(order), count)]
    room = [min(count, len(sizes) - start) for start in range(0, len(sizes), count)]
    parts: Parts = [[] for _ in room]
    totals = [0] * len(room)
    for index in _largest_first(sizes):
        part = min((p for p, most in enumerate(room) if len(parts[p]) < most), key=totals.__getitem__)
        parts[part].append(index)
        totals[part] += sizes[index]
    return [sorted(part) for part in parts]


def within(sizes: Sequence[int], tokens: int, padded: bool = False) -> Parts:
    """Few parts of at most `tokens` each: the largest first, each into the first part that has room for it.

    An example that is larger than that stands alone.
    """
    parts: Parts = []
    for index in _largest_first(sizes):
        room = (part for part in parts if _cost(sizes, [*part, index], padded) <= tokens)
        found = next(room, None)
        if found is None:
            parts.append([index])
        else:
            found.append(index)
    return [sorted(part) for part in parts]


def in_order(sizes: Sequence[int], tokens: int, padded: bool = False) -> Parts:
    """Neighbours together, at most `tokens` in a part, at least one example; sorted first where they are padded."""
    parts: Parts = []
    for index in _largest_first(sizes) if padded else range(len(sizes)):
        if parts and _cost(sizes, [*parts[-1], index], padded) <= tokens:
            parts[-1].append(index)
        else:
            parts.append([index])
    return [sorted(part) for part in parts]


def _largest_first(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda index: -sizes[index])


def _cost(sizes: Sequence[int], part: Sequence[int], padded: bool) -> int:
    own = [sizes[index] for index in part]
    return max(own) * len(own) if padded else sum(own)
