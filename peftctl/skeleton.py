"""The skeleton table: every module of a base with its path, kind and shapes, known without any weight.

Torch-free, so that counting, validation and completion answer at once. `surgery.skeleton(model)` makes the table from
a model (on the meta device or real); methods count on it and choose their targets in it, so that what is counted and
what is attached are the same by construction.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

from peftctl.errors import TargetError, suggest

LINEAR = frozenset({"Linear", "Conv1D"})
LINEAR_OR_EMBEDDING = LINEAR | {"Embedding"}
EXPERTS = frozenset({"Experts", "ExpertsTransposed"})


class Module(NamedTuple):
    """One module. `kind` is Linear, Conv1D, Embedding or Norm where it is one of these, else its class name.

    A module of experts holds each matrix of all of them as one parameter, (experts, out, in), or (experts, in, out)
    where its kind is ExpertsTransposed. `experts` gives such a parameter as a module of its own.
    """

    path: str
    kind: str
    type: str
    shapes: dict[str, tuple[int, ...]]  # its own parameters, as stored; Conv1D stores (in, out)

    @property
    def out_features(self) -> int:
        """Width of the output; for an embedding, the width of a row."""
        return self.shapes["weight"][-2 if self.kind in ("Linear", "Experts") else -1]

    def parameters(self) -> int:
        return sum(map(prod, self.shapes.values()))

    @property
    def in_features(self) -> int:
        """Width of the input; for an embedding, the number of rows."""
        return self.shapes["weight"][-1 if self.kind in ("Linear", "Experts") else -2]

    @property
    def matrices(self) -> int:
        """How many matrices it holds, one for each expert; 1 outside experts."""
        return prod(self.shapes["weight"][:-2])


class Dimensions(NamedTuple):
    """What a method must know of the shape of attention. Keys and values are `kv_heads * head_dim` wide.

    `layers`: of an encoder-decoder, those of the decoder; `encoder_layers`: those of an encoder beside it, else 0.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    encoder_layers: int = 0

    @property
    def deepest(self) -> int:
        """Layers of the deepest stack: a layer's number is below it."""
        return max(self.layers, self.encoder_layers)


class NewRows(NamedTuple):
    """New tokens, numbered from `first` on; `before`: rows that the base's own embeddings have."""

    first: int
    tokens: tuple[str, ...]
    before: int

    @property
    def number(self) -> int:
        return len(self.tokens)

    @property
    def total(self) -> int:
        """Rows that the embeddings have with them: some bases have spare ones."""
        return max(self.before, self.first + self.number)

    @property
    def slice(self) -> slice:
        return slice(self.first, self.first + self.number)


class Skeleton(NamedTuple):
    """`added`: the modules of a task's head. No base brings them, so no method finds them among `modules`."""

    architecture: str  # class name, as in config.json's `architectures`
    model_type: str
    modules: tuple[Module, ...]
    tied: dict[str, str]  # full name of an alias -> full name of the parameter it shares
    head: str | None  # path of the output head
    dimensions: Dimensions
    added: tuple[Module, ...] = ()
    rows: NewRows | None = None  # of model.add_tokens
    vocabulary: tuple[str, ...] = ()  # the modules that have these rows: the embeddings and the output head

    def __getitem__(self, path: str) -> Module:  # type: ignore[override]
        """The module at a dotted path; raises KeyError."""
        for module in self.modules:
            if module.path == path:
                return module
        raise KeyError(path)

    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        names = {(m.path, n): prod(s) for m in self.modules for n, s in m.shapes.items()}
        grown = 0 if self.rows is None else sum(self.row_sizes(self.rows.total - self.rows.before).values())
        return sum(size for (path, name), size in names.items() if dotted(path, name) not in self.tied) - grown

    def row_sizes(self, count: int) -> dict[str, int]:
        """Parameters in so many rows of the vocabulary, by module, tied ones at their first place."""
        shapes = {m.path: m.shapes for m in self.modules}
        own = {p: [s for n, s in shapes[p].items() if dotted(p, n) not in self.tied] for p in self.vocabulary}
        return {path: count * sum(prod(shape[1:]) for shape in found) for path, found in own.items() if found}


class Selection(NamedTuple):
    """The modules that a target specification matched, and how that reads to a person."""

    modules: tuple[Module, ...]
    summary: str  # "84 modules in 12 of 12 layers: q_proj, k_proj, ..."


def dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def layer_of(path: str) -> int | None:
    """The layer a path lies in: its first integer component, or None outside the layers."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def experts(skeleton: Skeleton) -> tuple[Module, ...]:
    """Each three-dimensional parameter of experts as a module: its full name as the path, itself as the weight."""
    return tuple(
        Module(dotted(module.path, name), module.kind, module.type, {"weight": shape})
        for module in skeleton.modules
        if module.kind in EXPERTS
        for name, shape in module.shapes.items()
        if len(shape) == 3
    )


def block_of(path: str) -> str:
    """The path of the layer that a path lies in, up to its first integer component; empty outside the layers."""
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", path)
    return found.group() if found else ""


def covered(skeleton: Skeleton, paths: Iterable[str]) -> str:
    """How many of all layers lie some of these modules in, to read: "2 of 12 layers"."""
    blocks = {block_of(path) for path in paths} - {""}
    return f"{len(blocks)} of {skeleton.dimensions.layers + skeleton.dimensions.encoder_layers} layers"


def select(
    skeleton: Skeleton,
    targets: str | Sequence[str],
    *,
    kinds: frozenset[str] = LINEAR,
    layers: Sequence[int] | None = None,
    key: str = "method.target_modules",
) -> Selection:
    """The modules of the given kinds that `targets` names.

    `targets` is `all-linear` (every linear but the output head), a list of names (each matches a path or its end, and
    each must match), or a regular expression for whole paths. `layers` keeps those layers only. Where `kinds` has
    experts, names and expressions match their parameters as well. Raises TargetError.
    """
    candidates = [m for m in skeleton.modules if m.kind in kinds and "weight" in m.shapes]
    candidates += [m for m in experts(skeleton) if m.kind in kinds]
    if targets == "all-linear":
        chosen = [m for m in candidates if m.kind in LINEAR and m.path != skeleton.head]
    elif isinstance(targets, str):
        chosen = _by_regex(skeleton, candidates, targets, key)
    else:
        chosen = _by_names(skeleton, candidates, targets, key)
    if layers is not None:
        chosen = _in_layers(skeleton, chosen, layers)
    if not chosen:
        raise TargetError(f"{key}: {targets!r} matches no module of {skeleton.architecture}; {_kinds(candidates)}")
    return Selection(tuple(chosen), _summary(skeleton, chosen))


def alone(skeleton: Skeleton, modules: Iterable[Module], key: str = "method.target_modules") -> None:
    """Refuse modules whose weight another has too: no weight could hold a change of one alone. Raises TargetError."""
    tied = {first: alias for alias, first in skeleton.tied.items()} | skeleton.tied
    for module in modules:
        if other := tied.get(dotted(module.path, "weight")):
            whole = skeleton.tied.get(other, other).rpartition(".")[0]
            raise TargetError(
                f"{key}: {module.path} shares its weight with {other.rpartition('.')[0]}, and this method would change "
                f"one of them alone; leave it out, or train both as they are with method.save_modules: [{whole}]"
            )


def _by_regex(skeleton: Skeleton, candidates: list[Module], pattern: str, key: str) -> list[Module]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise TargetError(f"{key}: {pattern!r} is not a regular expression: {error}") from None
    chosen = [m for m in candidates if compiled.fullmatch(m.path)]
    if not chosen:
        hint = " (a single name goes in a list: [" + pattern + "])" if _ending(candidates, pattern) else ""
        raise TargetError(
            f"{key}: the regular expression {pattern!r} matches no whole module path of {skeleton.architecture}"
            f"{hint}; {_kinds(candidates)}"
        )
    if [m.path for m in chosen] == [skeleton.head]:  # found by accident, it would train next to nothing
        raise TargetError(
            f"{key}: the regular expression {pattern!r} matches the output head alone; where that is meant, name it in "
            f"a list: [{skeleton.head}]"
        )
    return chosen


def _by_names(skeleton: Skeleton, candidates: list[Module], names: Sequence[str], key: str) -> list[Module]:
    wrong = [name for name in names if not _ending(candidates, name)]
    if wrong:
        raise TargetError(f"{key}: " + "; ".join(_unmatched(skeleton, candidates, name) for name in wrong))
    wanted = {m.path for name in names for m in _ending(candidates, name)}
    return [m for m in candidates if m.path in wanted]


def _ending(candidates: Sequence[Module], name: str) -> list[Module]:
    return [m for m in candidates if m.path == name or m.path.endswith("." + name)]


def _unmatched(skeleton: Skeleton, candidates: list[Module], name: str) -> str:
    others = _ending(skeleton.modules, name)
    if _ending(experts(skeleton), name):
        return f"{name!r} is a parameter of experts, which this method cannot adapt; {_kinds(candidates)}"
    if others:
        return f"{name!r} is a {others[0].type}, which this method cannot adapt; {_kinds(candidates)}"
    nearest = suggest(name, {m.path.rsplit(".", 1)[-1] for m in candidates})
    return f"{name!r} matches no module of {skeleton.architecture}{nearest or '; ' + _kinds(candidates)}"


def _in_layers(skeleton: Skeleton, chosen: list[Module], layers: Sequence[int]) -> list[Module]:
    outside = [layer for layer in layers if not 0 <= layer < skeleton.dimensions.deepest]
    if outside:
        last = skeleton.dimensions.deepest - 1
        raise TargetError(f"method.layers: {outside[0]} is not a layer of {skeleton.architecture}; 0 to {last} are")
    return [m for m in chosen if layer_of(m.path) in set(layers)]


def _kinds(candidates: Sequence[Module]) -> str:
    if not candidates:
        return "it has no module that this method can adapt"
    names = Counter(m.path.rsplit(".", 1)[-1] for m in candidates)
    return "it has " + ", ".join(f"{name} ({count})" for name, count in names.most_common(12))


def _summary(skeleton: Skeleton, chosen: Sequence[Module]) -> str:
    names = list(dict.fromkeys(m.path.rsplit(".", 1)[-1] for m in chosen))
    return f"{len(chosen)} modules in {covered(skeleton, [m.path for m in chosen])}: {', '.join(names)}"
