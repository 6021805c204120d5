"""What keys of a recipe name by a path: an adapter to go on from, an adapter or a model to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from peftctl import base as bases
from peftctl import model as models
from peftctl import objectives
from peftctl.data.chat import Chat
from peftctl.errors import InputError, ModelError, several
from peftctl.schema import Recipe
from peftctl.skeleton import Skeleton

if TYPE_CHECKING:
    from peftctl.formats.peft import Adapter


class Adapters(NamedTuple):
    """The adapters that keys of a recipe name: of its base and method, their tensors meant as there."""

    recipe: Recipe
    base: bases.Base
    skeleton: Skeleton
    trust_remote_code: bool

    def named(self, key: str, path: str | None) -> Adapter | None:
        """Raises InputError in one line, blamed on the key."""
        if path is None:
            return None
        from peftctl.adapter import fit
        from peftctl.formats import origin, peft
        from peftctl.opened import adapter_folder

        folder, method = adapter_folder(path), self.recipe.method
        if folder is None:
            raise InputError(f"{key}: {path} is neither a run nor an adapter")
        adapter = peft.read(folder, self.skeleton)
        if adapter.method.name != method.name:
            raise InputError(f"{key}: {folder} holds {adapter.method.name}, the recipe asks for {method.name}")
        if (unlike := origin.other_base(folder, adapter.trained_on, adapter.fingerprint, self.base)) is not None:
            rewrite = f"; peftctl export --to peft --base {self.base.name} would write it as one for these"
            raise InputError(f"{key}: {unlike}{rewrite if adapter.method.exchange else ''}")
        theirs, ours = (config.meaning(self.skeleton) for config in (adapter.config, method))
        unequal = [what for what in ours if ours[what] != theirs.get(what, ours[what])]
        differing = [f"{what} {theirs[what]}, not {ours[what]}" for what in unequal]
        if differing:
            raise InputError(f"{key}: {folder} has {several(differing)}; set method as it was set for that adapter")
        trust, what = self.trust_remote_code, f"{key} {folder}"
        fit(self.base, adapter.method, method, adapter.tensors, what, trust_remote_code=trust)
        return adapter


def referred(adapters: Adapters, chat: Chat) -> Adapter | bases.Base | None:
    """What `objective.reference` names: another model, or an adapter, which takes the trained one's place."""
    recipe, trust = adapters.recipe, adapters.trust_remote_code
    named = objectives.get(recipe.objective.name).reference(recipe.objective)
    if named in (None, "initial", "base"):
        return None
    if any((Path(named) / name).exists() for name in ("run.json", "adapter_config.json")):
        return adapters.named("objective.reference", named)
    return _other_model(named, chat, trust_remote_code=trust)


def _other_model(named: str, chat: Chat, *, trust_remote_code: bool) -> bases.Base:
    """A whole model to compare with, which must read the same tokens. Raises InputError."""
    if not (Path(named) / "config.json").is_file():
        raise InputError(f"objective.reference: {named} is neither a run nor an adapter nor a model")
    try:
        base = bases.resolve(named, trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise ModelError(f"objective.reference: {error}") from None
    known = models.skeleton(base, trust_remote_code=trust_remote_code).dimensions.vocabulary
    own = None if base.tokenizer is None else Chat(base.tokenizer).tokenizer.get_vocab()
    if known < chat.vocabulary or own not in (None, chat.tokenizer.get_vocab()):
        raise InputError(
            f"objective.reference: {named} has other tokens than {chat.folder}, so the probabilities of answers "
            "cannot be compared; name a model with the same tokenizer"
        )
    return base
