"""What a recipe would train, counted on the skeleton: no weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from peftctl.base import Base
from peftctl.methods.base import Method, MethodConfig
from peftctl.methods.whole import saved
from peftctl.model import skeleton


class Counts(NamedTuple):
    """Numbers of parameters. `trainable` is adapter and saved modules, a task's head among them; `total` is base and
    trainable."""

    adapter: int
    saved_modules: int
    trainable: int
    base: int
    total: int
    percent: float  # trainable of total
    summary: str
    places: dict[str, int]

    def document(self, by_module: bool) -> dict[str, Any]:
        found = self._asdict()
        places = found.pop("places")
        return found | ({"by_module": places} if by_module else {})


def count(base: Base, method: Method[Any], config: MethodConfig, *, trust_remote_code: bool = False) -> Counts:
    """Raises TargetError where the method cannot serve the base."""
    table = skeleton(base, trust_remote_code=trust_remote_code)
    counted = method.count(table, config)
    whole = saved(table, config.save_modules, counted.places).sizes(table)
    whole |= {m.path: m.parameters() for m in table.added if m.shapes}
    rows = {} if table.rows is None else table.row_sizes(table.rows.number)
    # where the matrix is trained as it is, its new rows are among the others
    sizes = {m.path: m.parameters() for m in table.modules}
    rows = {p: n for p, n in rows.items() if p not in whole and counted.places.get(p) != sizes[p]}
    own, beside, total = counted.total, sum(whole.values()) + sum(rows.values()), table.parameters()
    trainable = own + beside
    percent = 100 * trainable / (trainable + total)
    places = counted.places | whole
    places |= {path: size + places.get(path, 0) for path, size in rows.items()}
    summary = counted.summary if table.rows is None else f"{counted.summary}; {table.rows.number} new tokens"
    return Counts(own, beside, trainable, total, trainable + total, percent, summary, places)


def tree(places: Mapping[str, int]) -> list[str]:
    """Counts by path as an indented tree, to read: at an inner node stands the sum of what is inside it."""
    nodes = list(_nodes({tuple(path.split(".")): size for path, size in places.items()}, 1))
    named = [("  " * depth + name, f"{size:,}") for depth, name, size in nodes]
    width, digits = (max(map(len, column)) for column in zip(*named, strict=True))
    return [f"{name:<{width}}  {size:>{digits}}" for name, size in named]


def _nodes(places: Mapping[tuple[str, ...], int], depth: int) -> Iterator[tuple[int, str, int]]:
    """Depth, name and sum of each node under a path; a node without siblings shares its parent's line."""
    own, parts = places.get((), 0), dict.fromkeys(path[0] for path in places if path)
    if own and parts:
        yield depth, "itself", own
    for part in parts:
        name, inside = part, {path[1:]: size for path, size in places.items() if path[:1] == (part,)}
        while () not in inside and len({path[0] for path in inside}) == 1:
            name = f"{name}.{next(iter(inside))[0]}"
            inside = {path[1:]: size for path, size in inside.items()}
        yield depth, name, sum(inside.values())
        yield from _nodes(inside, depth + 1)
