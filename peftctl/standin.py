"""What a smoke run takes in place of a base that is not on this machine: a small one of the same kind. No downloads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from peftctl import base as bases
from peftctl import methods, objectives
from peftctl.base import Base
from peftctl.counting import count
from peftctl.errors import InputError
from peftctl.recipe import shared_folder
from peftctl.schema import Recipe

DECODERS, ENCODERS, TWO_SIDED = ("tiny-llama", "tiny-gpt2"), ("tiny-bert",), ("tiny-t5", "tiny-bart")


def architecture(recipe: Recipe, vocabulary: int) -> Base:
    """What the recipe's base looks like if it is here, else the first small base in which the method finds its places.

    Either has 2 narrow layers, and weights drawn at random.
    """
    name = recipe.model.name
    if is_here(name):
        return bases.shrink(bases.resolve(name, need="config"), vocabulary)
    found = [bases.shrink(bases.resolve(str(path), need="config"), vocabulary) for path in _candidates(recipe)]
    return next((base for base in found if _serves(base, recipe)), found[0])  # where none does, the method says why


def is_here(name: str) -> bool:
    return Path(name).exists() or name.endswith(".json")  # a config that is missing is a mistake, and told as one


def note(recipe: Recipe, base: Base) -> str | None:
    """What a user is told of a base that stands in for another."""
    if not recipe.model.shrink or is_here(recipe.model.name):
        return None
    kind = base.settings()["model_type"]
    return f"{recipe.model.name} is not on this machine: a tiny random base of the kind {kind} stands in for it"


def _candidates(recipe: Recipe) -> Iterator[Path]:
    names: tuple[str, ...] = DECODERS
    if recipe.model.task == "seq2seq-lm":
        names = TWO_SIDED
    elif recipe.model.task != "causal-lm":
        of_texts = objectives.get(recipe.objective.name).kinds & {"labelled", "tagged"}
        names = (*ENCODERS, *DECODERS) if of_texts else (*DECODERS, *ENCODERS)
    for name in names:
        yield shared_folder("configs") / "models" / f"{name}.json"


def _serves(base: Base, recipe: Recipe) -> bool:
    try:
        count(base, methods.get(recipe.method.name), recipe.method)
    except InputError:
        return False
    return True
