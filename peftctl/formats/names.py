"""What a tensor on disk is called in the model: transformers renames, and now and then takes apart, what it loads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Where a stored tensor goes. `whole` is False where it is only an ingredient of the parameter."""

    parameter: str
    whole: bool


def parameters(model: Any, stored: Iterable[str]) -> dict[str, Place]:
    """The parameter of each stored tensor, by the same rules as loading; what the model has no use for is left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    known = model.state_dict()
    prefix = model.base_model_prefix
    mapping = get_model_conversion_mapping(model)
    renamings: list[Any] = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters: list[Any] = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    found = {}
    for name in sorted(stored, key=dot_natural_key):  # some rules depend on what came before
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = name, None
        if renamed in known:
            found[name] = Place(renamed, pattern is None)
    return found
