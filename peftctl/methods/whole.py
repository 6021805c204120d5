"""Modules whose parameters are trained as they are: which those are, tied ones once; and `save_modules` of any method.

Torch-free. `_copies.py` makes the trained copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

from peftctl.errors import TargetError, suggest
from peftctl.skeleton import Module, Skeleton, dotted


class Weights(dict[str, dict[str, str]]):
    """Per module path, its trained parameters by name, each with the full name under which it is trained.

    A tied one is trained under the name of its first place, and stands at all of its places.
    """

    def own(self, path: str) -> list[str]:
        """The parameters of a module that are trained under its own path."""
        return [name for name, full in self[path].items() if full == dotted(path, name)]

    def sizes(self, skeleton: Skeleton) -> dict[str, int]:
        """Trained parameters of each module, tied ones at their first place alone."""
        shapes = {m.path: m.shapes for m in skeleton.modules}
        return {path: sum(prod(shapes[path][name]) for name in self.own(path)) for path in self if self.own(path)}


def weights(skeleton: Skeleton, modules: Iterable[Module]) -> Weights:
    """All parameters of these modules, and the places elsewhere that are tied to one of them."""
    wanted = {skeleton.tied.get(dotted(m.path, name), dotted(m.path, name)) for m in modules for name in m.shapes}
    found = Weights()
    for module in skeleton.modules:
        full = {name: dotted(module.path, name) for name in module.shapes}
        trained = {name: skeleton.tied.get(path, path) for name, path in full.items()}
        trained = {name: path for name, path in trained.items() if path in wanted}
        if trained:
            found[module.path] = trained
    return found


def whole(modules: Iterable[Module]) -> Weights:
    """All parameters of these modules, none of which is tied."""
    return Weights({m.path: {name: dotted(m.path, name) for name in m.shapes} for m in modules if m.shapes})


def saved(skeleton: Skeleton, names: Sequence[str] | None, adapted: Iterable[str] = ()) -> Weights:
    """What `save_modules` trains and saves whole. A name is a module path or its end; what is inside counts too.

    `adapted`: the places of the method itself, which must be others. Raises TargetError.
    """
    chosen: dict[str, Module] = {}
    for name in names or ():
        paths = named(skeleton, name)
        inside = [m for m in skeleton.modules if m.shapes and any(f"{m.path}.".startswith(f"{p}.") for p in paths)]
        if not inside:
            ends = {m.path.rsplit(".", 1)[-1] for m in skeleton.modules if m.shapes}
            what = "has no parameters" if paths else f"is no module of {skeleton.architecture}"
            raise TargetError(f"method.save_modules: {name!r} {what}{suggest(name, ends)}")
        chosen |= {m.path: m for m in inside}
    found = weights(skeleton, chosen.values())
    both = [path for path in adapted if path in found]
    if both:
        raise TargetError(f"method.save_modules: {both[0]} is adapted as well: leave it out of one of the two")
    return found


def named(skeleton: Skeleton, name: str) -> list[str]:
    """The modules whose path this is, or ends with it."""
    return [m.path for m in skeleton.modules if m.path == name or m.path.endswith(f".{name}")]
