"""Query, key and value inside one fused linear: which of its outputs are whose, by the class of its attention.

A part is named after its linear: `c_attn.q`, `query_key_value.v`, `qkv_proj.k`. Torch-free, like the skeleton table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from peftctl.errors import TargetError
from peftctl.skeleton import LINEAR, Dimensions, Module, Skeleton

PARTS = ("q", "k", "v")
Rows = tuple[int, ...]


def _beside(size: Dimensions) -> dict[str, Rows]:
    """[q | k | v]: all queries, then all keys, then all values."""
    queries, keys = size.heads * size.head_dim, size.kv_heads * size.head_dim
    bounds = (0, queries, queries + keys, queries + 2 * keys)
    return {part: tuple(range(*bounds[i : i + 2])) for i, part in enumerate(PARTS)}


def _grouped(size: Dimensions) -> dict[str, Rows]:
    """For each key-value head: the queries that use it, its key, its value. With a key for each query: by head."""
    shared = size.heads // size.kv_heads
    width = (shared + 2) * size.head_dim
    inside = {"q": (0, shared), "k": (shared, shared + 1), "v": (shared + 1, shared + 2)}
    return {
        part: tuple(
            group * width + row
            for group in range(size.kv_heads)
            for row in range(first * size.head_dim, last * size.head_dim)
        )
        for part, (first, last) in inside.items()
    }


LAYOUTS: dict[str, Callable[[Dimensions], dict[str, Rows]]] = {
    "GPT2Attention": _beside,
    "MptAttention": _beside,
    "Phi3Attention": _beside,
    "BloomAttention": _grouped,
    "FalconAttention": _grouped,
    "GPTNeoXAttention": _grouped,
}


class Targets(NamedTuple):
    """A list of target names, sorted into whole modules and parts of fused ones."""

    whole: list[str]
    parts: dict[str, dict[str, Rows]]  # path of the fused linear -> part -> its outputs


def sort(skeleton: Skeleton, names: Sequence[str], key: str = "method.target_modules") -> Targets:
    """Find the names that mean a part. Raises TargetError for a part of what is not known to be fused."""
    whole: list[str] = []
    parts: dict[str, dict[str, Rows]] = {}
    for name in names:
        fused = _fused(skeleton, name)
        if not fused:
            whole.append(name)
        for module in fused:
            letter = name.rpartition(".")[2]
            parts.setdefault(module.path, {})[letter] = _rows(skeleton, module, key)[letter]
    return Targets(whole, parts)


def _fused(skeleton: Skeleton, name: str) -> list[Module]:
    """The linears that a name means a part of; none where it is a module's own name (T5 has a linear `q`)."""
    stem, _, letter = name.rpartition(".")
    if letter not in PARTS or not stem or any(_ends(module.path, name) for module in skeleton.modules):
        return []
    return [m for m in skeleton.modules if m.kind in LINEAR and _ends(m.path, stem)]


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _rows(skeleton: Skeleton, module: Module, key: str) -> Mapping[str, Rows]:
    owner = next(m.type for m in skeleton.modules if m.path == module.path.rpartition(".")[0])
    layout = LAYOUTS.get(owner)
    if layout is None:
        raise TargetError(
            f"{key}: where query, key and value lie in {module.path} of {owner} is not known; "
            f"it is of {', '.join(LAYOUTS)}. Name the whole module"
        )
    rows = layout(skeleton.dimensions)
    width = sum(map(len, rows.values()))
    if width != module.out_features:
        raise TargetError(
            f"{key}: {module.path} gives {module.out_features} numbers, not the {width} of query, key and value"
        )
    return rows
