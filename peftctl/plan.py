"""Everything about a run that is known before a weight is read; making the plan refuses what can be refused."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from peftctl import base as bases
from peftctl import functions, methods, objectives, standin
from peftctl import model as models
from peftctl.counting import Counts, count
from peftctl.data.added import extended
from peftctl.data.chat import Chat
from peftctl.data.dataset import Prepared, prepare
from peftctl.data.formats import recognise
from peftctl.data.mixing import wanted
from peftctl.data.sides import chat_of
from peftctl.data.sources import read
from peftctl.data.templates import chosen
from peftctl.errors import DataError, InputError, ModelError
from peftctl.named import Adapters, referred
from peftctl.row import Example
from peftctl.schema import ModelConfig, Recipe
from peftctl.skeleton import EXPERTS, NewRows, Skeleton
from peftctl.task import Task
from peftctl.waiting import tokenising

if TYPE_CHECKING:
    from peftctl.formats.peft import Adapter


class Options(NamedTuple):
    """What the command line adds to a recipe."""

    resume: bool = False
    resume_from: str | None = None
    verify: bool = True
    trust_remote_code: bool = False
    quiet: bool = False
    profile: bool = False
    trust_recipe_code: bool = False
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
    reference: Adapter | bases.Base | None  # what the policy is compared with, where the recipe names a folder
    code: dict[str, str]  # functions of the user's own that the objective runs, and the sha256 of each one's file
    examples: int | None  # examples after which the run ends; None where steps alone end it
    steps: int
    warmup_steps: int


def plan(recipe: Recipe, options: Options) -> Plan:
    """Check recipe, base, data and targets against each other. Raises InputError."""
    trust, code = options.trust_remote_code, _code(recipe, options)
    base, chat = base_and_chat(recipe, trust_remote_code=trust, now=options.now)
    recipe, base = asked(recipe, base)
    recipe = recipe.model_copy(update={"method": recipe.method.tokenized(chat.encode)})
    if base.rows is not None:
        from peftctl.adapter import possible

        possible(base, methods.get(recipe.method.name), recipe.method, trust_remote_code=trust)
    counts = count(base, methods.get(recipe.method.name), recipe.method, trust_remote_code=trust)
    skeleton = models.skeleton(base, trust_remote_code=trust)
    _balanced(recipe, skeleton)
    with tokenising(options.quiet) as shown:
        data = prepare(recipe, chat, objectives.get(recipe.objective.name), skeleton.dimensions.vocabulary, shown)
    fit(data, base, recipe)
    adapters = Adapters(recipe, base, skeleton, trust)
    start = adapters.named("method.init_from", recipe.method.init_from)
    compared = referred(adapters, chat)
    examples, steps = _extent(recipe, len(data.train))
    warmup = recipe.train.warmup
    warmup_steps = math.ceil(warmup * steps) if warmup < 1 else int(warmup)
    output = Path(recipe.output)
    return Plan(
        *(recipe, output, base, skeleton, chat, data, counts, start, compared, code, examples, steps, warmup_steps)
    )


def _code(recipe: Recipe, options: Options) -> dict[str, str]:
    """The user's own functions that the recipe names, loaded once to see that they can be."""
    found = functions.checked(objectives.get(recipe.objective.name).code(recipe.objective), options.trust_recipe_code)
    for name in found:
        functions.load(name)
    return found


def asked(recipe: Recipe, base: bases.Base) -> tuple[Recipe, bases.Base]:
    """The recipe with what its data decides filled in, and the base with the head that it asks for. DataError."""
    objective = objectives.get(recipe.objective.name)
    if objective.settle is not None and not objective.labels(recipe.objective):
        examples = _examples(recipe, objective.kinds)
        if examples is not None:
            settled = objective.settle(recipe.objective, examples)
            recipe = recipe.model_copy(update={"objective": settled})
    labels = objective.labels(recipe.objective)
    return recipe, base._replace(task=Task(objective.task, labels)) if labels else base


def _examples(recipe: Recipe, kinds: Collection[str]) -> list[Example] | None:
    """All examples of the training sources; None where they are no such rows, of which the data's check says more."""
    data, examples = recipe.data, list[Example]()
    if data.streaming:
        raise DataError("objective.labels: name the labels; with data.streaming the rows are not all read beforehand")
    for one in wanted(data.train):
        if one.path is None:
            raise DataError(f"objective.labels: name the labels of {one.hub}; only files are searched for them")
        columns = data.columns if one.columns is None else one.columns
        found = recognise(read(one.path), one.format or data.format, columns, kinds)
        if found.kind not in kinds or (found.faults and data.on_bad_row != "skip"):
            return None
        examples += found.examples
    return examples


def fit(data: Prepared, base: bases.Base, recipe: Recipe) -> int | None:
    """The positions that the base has for a row, beside the method's virtual tokens; None where it says nothing.

    Raises DataError where a row is longer, or where no held-out row can be answered that is to be.
    """
    _answerable(data, recipe)
    known, virtual = base.positions, methods.get(recipe.method.name).traits(recipe.method).virtual_tokens
    if known is None:
        return None
    room = known - virtual
    reports = [report for report in (data.report, data.validation_report) if report is not None]
    if data.stream is not None:  # of its rows no more is known than what is refused
        reports[0] = data.report._replace(reach=recipe.data.max_length)
    for report in reports:
        if report.reach > room:
            taken = f", {virtual} of them for virtual tokens" if virtual else ""
            raise DataError(
                f"{report.name}: the longest row has {report.reach} tokens, the base has positions for {known}"
                f"{taken}; set data.max_length to at most {room}, and data.on_bad_row: skip to leave longer rows out, "
                "or data.truncate to cut them"
            )
    return room


def _answerable(data: Prepared, recipe: Recipe) -> None:
    """Refuse to compare answers where no held-out row has a prompt. Raises DataError."""
    held = data.validation
    if held is None or objectives.get(recipe.objective.name).generates(recipe.objective) is None:
        return
    if not any("asked" in row.extra for index in range(len(held)) for row in held.rows([index])):
        raise DataError(
            f"objective.metrics: no held-out row of {held.name} has a prompt to answer; leave it out for raw text"
        )


def base_and_chat(
    recipe: Recipe, *, trust_remote_code: bool = False, with_weights: bool = True, now: datetime | None = None
) -> tuple[bases.Base, Chat]:
    """The recipe's base on this machine, and its tokenizer, both with the tokens that it adds."""
    wanted = recipe.model
    if wanted.shrink:
        plain = Chat(_tokenizer(wanted.tokenizer))
        base = suited(standin.architecture(recipe, plain.vocabulary), recipe)._replace(tokenizer=plain.folder)
    else:
        base = suited(_resolved(wanted, with_weights, trust_remote_code), recipe)
    if wanted.add_tokens is not None:
        base = _with_tokens(base, wanted.add_tokens)
    return base, _chat(base.tokenizer, base, recipe, now)


def _resolved(wanted: ModelConfig, with_weights: bool, trust_remote_code: bool) -> bases.Base:
    try:
        return bases.resolve(
            wanted.name,
            wanted.revision,
            wanted.tokenizer,
            need="weights" if with_weights else "tokenizer",
            trust_remote_code=trust_remote_code,
        )
    except ModelError as error:
        raise ModelError(f"model.name: {error}") from None


def _with_tokens(base: bases.Base, tokens: Sequence[str]) -> bases.Base:
    """A base that is given new tokens, with a tokenizer that has them. Raises InputError."""
    if twice := [token for token, times in Counter(tokens).items() if times > 1]:
        raise InputError(f"model.add_tokens: {twice[0]!r} is named twice")
    own, before = Chat(_tokenizer(base.tokenizer)), base.vocabulary
    if before is None or own.vocabulary > before:
        raise ModelError(
            f"model.add_tokens: the tokenizer has {own.vocabulary} tokens, the base {before} rows for them"
        )
    rows = NewRows(own.vocabulary, tuple(tokens), before)
    return base._replace(tokenizer=extended(own.folder, tokens), rows=rows)


def without_tokens(planned: Plan) -> tuple[bases.Base, Chat]:
    """Base and tokenizer without the adapter's new tokens, and then without a template that may need them."""
    if planned.base.rows is None:
        return planned.base, planned.chat
    recipe = planned.recipe
    model = recipe.model.model_copy(update={"add_tokens": None})
    data = recipe.data.model_copy(update={"chat_template": None, "system": None})
    base, chat = base_and_chat(recipe.model_copy(update={"model": model, "data": data}))
    return base._replace(task=planned.base.task), chat


def suited(base: bases.Base, recipe: Recipe) -> bases.Base:
    """The base, whose kind must be the one that the recipe asks for. Raises ModelError."""
    task, kind = recipe.model.task, base.settings()["model_type"]
    if base.two_sided and task != "seq2seq-lm":
        raise ModelError(f"model.name: {base.name} is an encoder-decoder ({kind}): set model.task: seq2seq-lm")
    if task == "seq2seq-lm" and not base.two_sided:
        raise ModelError(f"model.task: seq2seq-lm asks for an encoder-decoder, and {base.name} ({kind}) is none")
    return base


def _chat(folder: Path | str | None, base: bases.Base, recipe: Recipe, now: datetime | None) -> Chat:
    """The tokenizer in a folder, with the template and the system prompt that the recipe asks for."""
    wanted = recipe.data.chat_template
    template = chosen(wanted) if wanted is not None else None
    return chat_of(base.start(), _tokenizer(folder), template, now, recipe.data.system)


def _tokenizer(folder: Path | str | None) -> Path | str:
    if folder is None:
        raise ModelError("the base has no tokenizer.json: name a tokenizer's folder as model.tokenizer")
    return folder


def _extent(recipe: Recipe, rows: int) -> tuple[int | None, int]:
    """Examples and optimizer steps until the end."""
    settings = recipe.train
    if settings.max_steps is not None:
        return None, settings.max_steps
    examples = max(1, round((settings.epochs or 1.0) * rows))
    repeats = objectives.get(recipe.objective.name).repeats(recipe.objective)
    return examples, math.ceil(examples / (settings.batch_size * settings.gradient_accumulation)) * repeats


def _balanced(recipe: Recipe, skeleton: Skeleton) -> None:
    """Refuse to balance experts where there are none."""
    if recipe.train.router_loss and not any(module.kind in EXPERTS for module in skeleton.modules):
        raise InputError(f"train.router_loss: {skeleton.architecture} has no experts to balance; leave it out")
