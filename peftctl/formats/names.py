"""What tensors on disk are called in the model: transformers renames, takes apart and puts together what it loads.

All of it goes by transformers' own mapping, in both directions: of Mixtral, what is stored expert by expert as w1 and
w3 is one parameter, and is stored so again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

from torch import Tensor


class Place(NamedTuple):
    """Where a stored tensor goes. `whole` is False where it is only an ingredient of the parameter."""

    parameter: str
    whole: bool


class Rules(NamedTuple):
    """A model's mapping, as loading has it: renamings first, then at most one converter."""

    renamings: list[Any]
    converters: list[Any]
    prefix: str
    known: Mapping[str, Any]


def rules(model: Any) -> Rules:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    return Rules(renamings, converters, model.base_model_prefix, model.state_dict())


def parameters(model: Any, stored: Iterable[str]) -> dict[str, Place]:
    """The parameter of each stored tensor, by the same rules as loading; what the model has no use for is left out."""
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    own, found = rules(model), {}
    for name in sorted(stored, key=dot_natural_key):  # some rules depend on what came before
        renamed, pattern = rename_source_key(name, own.renamings, own.converters, own.prefix, own.known)
        if renamed not in own.known and name in own.known:
            renamed, pattern = name, None
        if renamed in own.known:
            found[name] = Place(renamed, pattern is None)
    return found


class Parts:
    """Stored tensors that one rule makes parameters of, all of them together."""

    def __init__(self, model: Any, own: Rules, converter: Any, key: str) -> None:
        self.model = model
        self.rules = own
        self.converter = converter
        self.key = key  # the first parameter that it makes, as the mapping calls it
        self.sources: dict[str, tuple[str, str]] = {}  # stored name -> its pattern in the rule, its name there

    def joined(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters, under the mapping's names, of all the stored tensors, under their own."""
        tensors = [(self.key, name, pattern, stored[own]) for own, (pattern, name) in self.sources.items()]
        return self._converted(deepcopy(self.converter), tensors)

    def parted(self, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `joined` was given, of what it gave. Raises KeyError where the mapping does not lead back."""
        back = self.converter.reverse_transform()
        tensors = []
        for name, tensor in made.items():
            key, pattern = back.rename_source_key(name)
            tensors.append((key, name, pattern, tensor))
        found = self._converted(back, tensors)
        return {own: found[name] for own, (_, name) in self.sources.items()}

    def _converted(self, converter: Any, tensors: list[tuple[str, str, str, Tensor]]) -> dict[str, Tensor]:
        for key, name, pattern, tensor in tensors:
            converter.add_tensor(key, name, pattern, tensor)
        found = converter.convert(tensors[0][0], model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}

    def parameter(self, name: str) -> str:
        """The full name in the model of a parameter as the mapping calls it."""
        from transformers.core_model_loading import rename_source_key

        full: str = rename_source_key(name, [], [], self.rules.prefix, self.rules.known)[0]
        return full


def parts(model: Any, stored: Iterable[str]) -> list[Parts]:
    """What of the stored tensors is put together or taken apart on loading."""
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    own, found = rules(model), dict[str, Parts]()
    for name in sorted(stored, key=dot_natural_key):
        renamed, _ = rename_source_key(name, own.renamings, [])
        for converter in own.converters:
            key, pattern = converter.rename_source_key(renamed)
            if pattern is not None:
                found.setdefault(key, Parts(model, own, converter, key)).sources[name] = (pattern, renamed)
                break
    return list(found.values())
