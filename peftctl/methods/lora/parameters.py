"""How peft stores products beside three-dimensional parameters: its `target_parameters`.

It wraps a module once for each of its chosen parameters, in the order in which the module has them, so a tensor's name
says its parameter by the number of wrappers that lie inside. The products of all experts are one matrix each: A is
(experts * rank, in), expert by expert, and B is (out, rank * experts), with an expert's columns apart from each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peftctl.errors import FormatError, several
from peftctl.methods._peft import PREFIX
from peftctl.skeleton import Module, Skeleton, dotted, experts

INNER = ".base_layer"


def stems(skeleton: Skeleton, paths: Iterable[str]) -> dict[str, Module]:
    """The modules' names in peft's files, without what follows a path, each with the parameter of experts it means."""
    wanted, found = set(paths), dict[str, Module]()
    matrices = {module.path: module for module in experts(skeleton)}
    for module in skeleton.modules:
        inside = [path for name in module.shapes if (path := dotted(module.path, name)) in wanted & matrices.keys()]
        for depth, path in enumerate(reversed(inside)):
            found[module.path + INNER * depth] = matrices[path]
    return found


def named(skeleton: Skeleton, paths: Sequence[str]) -> list[str]:
    """Names for `target_parameters` that mean these parameters and no others."""
    ends = list(dict.fromkeys(".".join(path.split(".")[-2:]) for path in paths))
    return ends if set(_matched(skeleton, ends)) == set(paths) else list(paths)


def read(names: Iterable[str], skeleton: Skeleton, tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The products of what `target_parameters` names, under our names, and the other tensors as they are.

    Raises FormatError for a parameter that is not of experts, and for one that the file has nothing for.
    """
    wanted, known = _matched(skeleton, names), {module.path for module in experts(skeleton)}
    if strange := [path for path in wanted if path not in known]:
        raise FormatError(
            f"adapter_config.json: target_parameters names {strange[0]}, and only those of experts are read"
        )
    places = {
        f"{PREFIX}{stem}.lora_{letter}.weight": (letter.lower(), module)
        for stem, module in stems(skeleton, wanted).items()
        for letter in "AB"
    }
    if lost := [name for name in places if name not in tensors]:
        raise FormatError(f"adapter_model.safetensors: {several([f'{name} is missing' for name in lost])}")
    found = {f"{module.path}.{letter}": stacked(letter, tensors[n], module) for n, (letter, module) in places.items()}
    return found, {name: tensor for name, tensor in tensors.items() if name not in places}


def _matched(skeleton: Skeleton, names: Iterable[str]) -> list[str]:
    full = [dotted(module.path, name) for module in skeleton.modules for name in module.shapes]
    return [path for path in full if any(path == name or path.endswith(f".{name}") for name in names)]


def flat(a: Any, b: Any) -> tuple[Any, Any]:
    """A (experts, rank, in) and B (experts, out, rank) as peft has them."""
    return a.reshape(-1, a.shape[-1]), b.permute(1, 2, 0).reshape(b.shape[1], -1)


def stacked(letter: str, stored: Any, module: Module) -> Any:
    """One of the two from a file of peft's, as we have it. Raises FormatError for a shape that it cannot have."""
    side = 0 if letter == "a" else 1
    if stored.ndim != 2 or stored.shape[side] % module.matrices:
        raise FormatError(f"{module.path}: {tuple(stored.shape)} is not divided by its {module.matrices} experts")
    if letter == "a":
        return stored.reshape(module.matrices, -1, stored.shape[1])
    return stored.reshape(stored.shape[0], -1, module.matrices).permute(2, 0, 1)


def apart(paths: Iterable[str], skeleton: Skeleton) -> tuple[list[str], list[str]]:
    """Paths of modules, and those of parameters of experts."""
    known, listed = {module.path for module in experts(skeleton)}, list(paths)
    return [path for path in listed if path not in known], [path for path in listed if path in known]
