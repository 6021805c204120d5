"""Everything about a run that is known before a weight is read; making the plan refuses what can be refused."""

from __future__ import annotations

import math
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peftctl import base as bases
from peftctl import methods, objectives
from peftctl import model as models
from peftctl.counting import Counts, count
from peftctl.data.chat import Chat
from peftctl.data.dataset import Prepared, prepare
from peftctl.errors import DataError, InputError, ModelError
from peftctl.recipe import shared_folder
from peftctl.schema import Recipe
from peftctl.skeleton import Skeleton
from peftctl.task import Task
from peftctl.waiting import tokenising

if TYPE_CHECKING:
    from peftctl.formats.peft import Adapter
    from peftctl.methods.base import MethodConfig


class Options(NamedTuple):
    """What the command line adds to a recipe."""

    resume: bool = False
    resume_from: str | None = None
    verify: bool = True
    trust_remote_code: bool = False
    quiet: bool = False
    profile: bool = False
    now: datetime | None = None  # what a chat template is told; of a resumed run, what it was told before


class Plan(NamedTuple):
    recipe: Recipe
    folder: Path
    base: bases.Base
    skeleton: Skeleton
    chat: Chat
    data: Prepared
    counts: Counts
    start: Adapter | None  # the adapter that training continues from
    reference: Adapter | None  # the adapter that the policy is compared with, where the recipe names one
    examples: int | None  # examples after which the run ends; None where steps alone end it
    steps: int
    warmup_steps: int


def plan(recipe: Recipe, options: Options) -> Plan:
    """Check recipe, base, data and targets against each other. Raises InputError."""
    trust = options.trust_remote_code
    base, chat = base_and_chat(recipe, trust_remote_code=trust, now=options.now)
    recipe, base = asked(recipe, base)
    counts = count(base, methods.get(recipe.method.name), recipe.method, trust_remote_code=trust)
    skeleton = models.skeleton(base, trust_remote_code=trust)
    with tokenising(options.quiet) as shown:
        data = prepare(recipe, chat, objectives.get(recipe.objective.name), skeleton.dimensions.vocabulary, shown)
    _fit(data, base, methods.get(recipe.method.name).traits(recipe.method).virtual_tokens)
    start = _adapter("method.init_from", recipe.method.init_from, recipe, skeleton)
    reference = _reference(recipe, skeleton)
    examples, steps = _extent(recipe, len(data.train))
    warmup = recipe.train.warmup
    warmup_steps = math.ceil(warmup * steps) if warmup < 1 else int(warmup)
    output = Path(recipe.output)
    return Plan(recipe, output, base, skeleton, chat, data, counts, start, reference, examples, steps, warmup_steps)


def asked(recipe: Recipe, base: bases.Base) -> tuple[Recipe, bases.Base]:
    """The recipe with what its data decides filled in, and the base with the head that it asks for. DataError."""
    objective = objectives.get(recipe.objective.name)
    labels = objective.labels(recipe.objective)
    return recipe, base._replace(task=Task(objective.task, labels)) if labels else base


def _fit(data: Prepared, base: bases.Base, virtual: int) -> None:
    """Refuse rows that are longer than the base has positions for, beside so many virtual tokens."""
    settings = base.settings()
    known = [settings[key] for key in ("n_positions", "max_position_embeddings") if isinstance(settings.get(key), int)]
    for report in filter(None, (data.report, data.validation_report)):
        if known and report.longest > min(known) - virtual:
            taken = f", {virtual} of them for virtual tokens" if virtual else ""
            raise DataError(
                f"{report.name}: the longest row has {report.longest} tokens, the base has positions for {min(known)}"
                f"{taken}; set data.max_length to at most {min(known) - virtual}, and data.on_bad_row: skip to leave "
                "longer rows out"
            )


def base_and_chat(
    recipe: Recipe, *, trust_remote_code: bool = False, with_weights: bool = True, now: datetime | None = None
) -> tuple[bases.Base, Chat]:
    """The recipe's base on this machine, and its tokenizer."""
    wanted = recipe.model
    if wanted.shrink:
        chat = Chat(_tokenizer(wanted.tokenizer), now=now)
        return bases.shrink(_architecture(wanted.name), chat.vocabulary)._replace(tokenizer=chat.folder), chat
    try:
        base = bases.resolve(
            wanted.name,
            wanted.revision,
            wanted.tokenizer,
            need="weights" if with_weights else "tokenizer",
            trust_remote_code=trust_remote_code,
        )
    except ModelError as error:
        raise ModelError(f"model.name: {error}") from None
    return base, Chat(_tokenizer(base.tokenizer), now=now)


def _tokenizer(folder: Path | str | None) -> Path | str:
    if folder is None:
        raise ModelError("the base has no tokenizer.json: name a tokenizer's folder as model.tokenizer")
    return folder


def _architecture(name: str) -> bases.Base:
    """The architecture to shrink: what the recipe names if it is on this machine, else a small Llama. No downloads."""
    path = Path(name)
    if path.is_dir() or name.endswith(".json"):
        return bases.resolve(name, need="config")
    return bases.resolve(str(shared_folder("configs") / "models" / "tiny-llama.json"))


def _adapter(key: str, path: str | None, recipe: Recipe, skeleton: Skeleton) -> Adapter | None:
    """The adapter that a key of the recipe names, which must be of the recipe's method."""
    if path is None:
        return None
    from peftctl.formats import peft
    from peftctl.opened import adapter_folder

    folder = adapter_folder(path)
    if folder is None:
        raise InputError(f"{key}: {path} is neither a run nor an adapter")
    adapter = peft.read(folder, skeleton)
    if adapter.method.name != recipe.method.name:
        raise InputError(f"{key}: {folder} holds {adapter.method.name}, the recipe asks for {recipe.method.name}")
    return adapter


def _reference(recipe: Recipe, skeleton: Skeleton) -> Adapter | None:
    """The adapter of `objective.reference`, which takes the trained one's place: its settings must be the same."""
    named = objectives.get(recipe.objective.name).reference(recipe.objective)
    if named in (None, "initial", "base"):
        return None
    adapter = _adapter("objective.reference", named, recipe, skeleton)
    assert adapter is not None
    try:
        theirs, ours = (_settings(adapter, config, skeleton) for config in (adapter.config, recipe.method))
    except KeyError:
        return adapter  # it lacks a tensor: loading it tells which
    differing = [key for key in ours if theirs.get(key) != ours[key]]
    if differing:
        told = ", ".join(f"{key} {theirs.get(key)!r}, not {ours[key]!r}" for key in differing)
        raise InputError(f"objective.reference: {adapter.folder} has {told}; method must be set as for the reference")
    return adapter


def _settings(adapter: Adapter, config: MethodConfig, skeleton: Skeleton) -> dict[str, Any]:
    """What a method's block makes of an adapter's tensors: as it would be saved, for there defaults are spelled out."""
    exchange = adapter.method.exchange
    keys = config.model_dump() if exchange is None else exchange().write(config, skeleton, adapter.tensors)[0]
    # what matters in training alone
    return {key: value for key, value in keys.items() if key != "init_from" and not key.endswith("dropout")}


def _extent(recipe: Recipe, rows: int) -> tuple[int | None, int]:
    """Examples and optimizer steps until the end."""
    settings = recipe.train
    if settings.max_steps is not None:
        return None, settings.max_steps
    examples = max(1, round((settings.epochs or 1.0) * rows))
    return examples, math.ceil(examples / (settings.batch_size * settings.gradient_accumulation))
