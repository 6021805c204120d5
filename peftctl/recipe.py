"""A recipe: one strict, typed document. Every mistake in it is told in one go, each with its place and the remedy."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from peftctl import evaluable, methods, objectives
from peftctl.blame import problems_of
from peftctl.composed import Files, found, merged, overridden, placed, relocated
from peftctl.composed import shared_folder as shared_folder
from peftctl.errors import Problem, RecipeError, suggest
from peftctl.located import Node, Place, write
from peftctl.methods.base import MethodConfig
from peftctl.objectives.base import ObjectiveConfig
from peftctl.row import FORMATS
from peftctl.schema import DataConfig, ModelConfig, Recipe, SourceConfig, TrainConfig
from peftctl.task import HEADED

BLOCKS: dict[str, type[BaseModel]] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
NAMED: dict[str, Any] = {"method": methods, "objective": objectives}
TOP = ("extends", "model", "method", "objective", "data", "train", "output")


def load(
    path: Path, overrides: Sequence[str] = (), smoke: bool = False, options: Mapping[str, str] | None = None
) -> Recipe:
    """The recipe in a file with what it extends, smoke settings and overrides laid over it. Raises RecipeError.

    `options` are keys that have a command-line option of their own name, which a mistake is blamed on.
    """
    problems: list[Problem] = []
    root = Files(problems).extended(found(Path(), str(path)))
    if smoke:
        root = merged(root, _smoke(root))
    root = merged(root, overridden(overrides, problems))
    for key, value in (options or {}).items():
        root = merged(root, placed(key, value, Place(f"--{key.split('.')[-1]} {value}")))
    if smoke:
        root = _with_rows(root)
    return _validated(root, problems)


def method_block(name: str, overrides: Sequence[str] = ()) -> MethodConfig:
    """The method block that a name and overrides of `method.*` give. Raises RecipeError."""
    problems: list[Problem] = []
    named = placed("method.name", name, Place(f"--method {name}"))
    root = merged(overridden(overrides, problems), named)
    stray = [node.key or node.place for key, node in root.value.items() if key != "method"]
    problems += [place.problem("only method.* can be set with --base and --method") for place in stray]
    config = _named(root, "method", problems)
    if problems:
        raise RecipeError(problems)
    assert isinstance(config, MethodConfig)
    return config


def resolved(recipe: Recipe) -> str:
    """The whole recipe as YAML that loads to the same recipe."""
    text = write(recipe.model_dump(mode="json"))
    return "# Resolved: every key that the run used. `peftctl train` takes it again as it is.\n" + text


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, with every method and objective there is."""
    properties: dict[str, Any] = {key: block.model_json_schema() for key, block in BLOCKS.items()}
    for key, package in NAMED.items():
        variants = []
        for name in package.names():
            schema = package.get(name).config.model_json_schema()
            schema["properties"]["name"] = {"const": name}
            variants.append(schema)
        properties[key] = {"oneOf": variants}
    one_or_many = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    properties |= {"output": {"type": "string"}, "extends": one_or_many}
    blocks = [block for value in properties.values() for block in value.get("oneOf", [value])]
    shared: dict[str, Any] = {}
    for block in blocks:  # a reference is read from the document's root
        shared |= block.pop("$defs", {})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "peftctl recipe",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        **({"$defs": shared} if shared else {}),
    }


def starter() -> str:
    """A recipe to begin with; it runs as it is."""
    return (shared_folder("recipes") / "starter.yaml").read_text("utf-8")


def suitable(objective: str) -> list[str]:
    """The formats of rows that an objective can learn from."""
    return [name for name, kind in FORMATS.items() if kind in objectives.get(objective).kinds]


def _smoke(root: Node) -> Node:
    """What `--smoke` lays over a recipe; of a method's and an objective's keys, those that the recipe's have."""
    over = relocated(Files([]).extended(shared_folder("configs") / "smoke.yaml"), Place("--smoke"))
    for part, package in NAMED.items():
        block, own = over.value.pop(part), root.at((part,)).plain()
        if isinstance(own, dict) and own.get("name") in package.names():
            known = package.get(own["name"]).config.model_fields
            over.value[part] = Node({key: node for key, node in block.value.items() if key in known}, block.place)
    return over


def _with_rows(root: Node) -> Node:
    """A smoke run whose data is not on this machine takes the rows that ship with the package."""
    if _is_here(root.at(("data", "train")).plain()):
        return root
    name = root.at(("objective", "name")).plain()
    if name not in objectives.names():
        return root
    shipped = [shared_folder("configs") / "data" / f"{kind}.jsonl" for kind in sorted(objectives.get(name).kinds)]
    rows = next(path for path in shipped if path.is_file())
    for key, value in {"train": str(rows), "format": "auto", "columns": None}.items():
        root = merged(root, placed(f"data.{key}", value, Place("--smoke")))
    return root


def _is_here(train: Any) -> bool:
    """Whether all sources are on this machine; what is no source at all is for others to refuse."""
    if isinstance(train, list):
        return all(map(_is_here, train))
    if isinstance(train, dict) and "hub" in train:
        return False  # it may be, but a smoke run asks no hub
    path = train.get("path") if isinstance(train, dict) else train
    return not isinstance(path, str) or os.path.exists(path) or bool(glob.glob(path, recursive=True))


def _validated(root: Node, problems: list[Problem]) -> Recipe:
    problems += [
        (node.key or node.place).problem(f"{key} is not a key of a recipe{suggest(key, TOP)}")
        for key, node in root.value.items()
        if key not in TOP
    ]
    blocks: dict[str, Any] = {key: _block(root, key, cls, problems) for key, cls in BLOCKS.items()}
    blocks |= {key: _named(root, key, problems) for key in NAMED}
    output = root.value.get("output")
    if output is None or not isinstance(output.value, str) or not output.value:
        place = output.place if output is not None else root.place
        problems.append(
            place.problem("output is missing: the run's folder" if output is None else "output is a folder")
        )
    problems += _conflicts(blocks, root)
    if problems:
        raise RecipeError(sorted(problems, key=lambda p: (p.file, p.line, p.column)))
    assert output is not None
    return Recipe(output=output.value, **blocks)


def _block(root: Node, key: str, cls: type[BaseModel], problems: list[Problem]) -> BaseModel | None:
    if key not in root.value:
        if any(field.is_required() for field in cls.model_fields.values()):
            problems.append(root.place.problem(f"{key} is missing"))
            return None
        return cls()
    found, wrong = problems_of(cls, root.value[key], key)
    problems.extend(wrong)
    return found


def _named(root: Node, key: str, problems: list[Problem]) -> BaseModel | None:
    """A method or objective block, whose class its name decides."""
    package = NAMED[key]
    node, name = root.at((key,)), root.at((key, "name"))
    if key not in root.value or not isinstance(node.value, dict) or "name" not in node.value:
        problems.append(node.place.problem(f"{key}.name is missing: one of {', '.join(package.names())}"))
        return None
    if name.value not in package.names():
        near = suggest(str(name.plain()), package.names()) or f"; there is {', '.join(package.names())}"
        problems.append(name.place.problem(f"{key}.name: there is no {key} {name.plain()!r}{near}"))
        return None
    return _block(root, key, package.get(name.value).config, problems)


def _unfit(task: str, config: Any) -> str | None:
    """Why an objective cannot be put to a base that is asked for a task, None if it can."""
    objective = objectives.get(config.name)
    if task == "seq2seq-lm" and objective.task == "causal-lm":
        return objective.one_sided(config)
    return None if task == objective.task else f"which needs {objective.task}"


def _sources(
    data: DataConfig | None, objective: ObjectiveConfig | None, at: Callable[[str, str], Problem]
) -> Iterator[Problem]:
    """What is wrong with sources beside each other."""
    for key in ("train", "validation") if data else ():
        value = getattr(data, key)
        sources = value if isinstance(value, list) else [value]
        given = [one.weight is not None for one in sources if isinstance(one, SourceConfig)]
        if any(given) and key == "validation":
            yield at("data.validation", "has weights: held-out rows are each measured once; leave weight out")
        elif any(given) and len(sources) == 1:
            yield at("data.train", "has a weight, but no other source: leave it out")
        elif any(given) and not all(given + [False] * (len(sources) - len(given))):
            yield at("data.train", "has a weight for some sources only: give every one {path: ..., weight: ...}")
        for number, one in enumerate(sources):
            if (
                objective
                and isinstance(one, SourceConfig)
                and one.format not in {None, "auto", *suitable(objective.name)}
            ):
                kinds = " or ".join(suitable(objective.name))
                place = f"data.{key}.{number}.format" if isinstance(value, list) else f"data.{key}.format"
                yield at(place, f"{one.format} does not suit objective {objective.name}, which learns from {kinds}")


def _streamed(data: DataConfig, train: TrainConfig) -> Iterator[tuple[str, str]]:
    """What streaming cannot do, by key: nobody knows all rows."""
    if train.max_steps is None:
        yield "train.max_steps", "must be given with data.streaming, for nobody knows how many rows there are"
    if data.truncate == "split":
        yield "data.truncate", "split is not for data.streaming: take another"


def _conflicts(blocks: Mapping[str, Any], root: Node) -> Iterator[Problem]:
    """What is right alone and wrong together, of the blocks that are right (the others are None).

    By traits, never by a method's name.
    """
    model, method, objective, data, train = (blocks[key] for key in ("model", "method", "objective", "data", "train"))

    def at(key: str, message: str) -> Problem:
        return root.at(tuple(int(part) if part.isdigit() else part for part in key.split("."))).place.problem(
            f"{key} {message}"
        )

    if method and train and train.gradient_checkpointing and methods.get(method.name).traits(method).needs_cache:
        lost = f"would lose method {method.name}'s virtual tokens: set it to false"
        yield at("train.gradient_checkpointing", lost)
    if train and train.max_steps is not None and train.epochs is not None:
        yield at("train.epochs", "and train.max_steps are both given: keep one, set the other to null")
    if train and train.max_steps is not None and train.warmup > train.max_steps:
        yield at("train.warmup", f"is {train.warmup:g} of {train.max_steps} steps: lower it")
    if train and train.warmup >= 1 and not train.warmup.is_integer():
        yield at("train.warmup", f"{train.warmup:g} is neither a fraction nor a number of steps")
    if train and model and train.head_learning_rate is not None and model.task not in HEADED:
        yield at("train.head_learning_rate", f"has no new head: model.task is {model.task}; leave it out")
    if train and train.compile:
        yield at("train.compile", "is not served, as it shortened steps by 3% after 16 s of compiling: leave it false")
    yield from (at(key, message) for key, message in evaluable.faults(objective, data, train))
    yield from _sources(data, objective, at)
    if data and train and data.streaming:
        yield from (at(key, message) for key, message in _streamed(data, train))
    if data and objective and data.format not in {"auto", *suitable(objective.name)}:
        kinds = " or ".join(suitable(objective.name))
        yield at("data.format", f"{data.format} does not suit objective {objective.name}, which learns from {kinds}")
    if data and objective and data.truncate == "split":
        if data.format not in ("auto", "text") or "text" not in suitable(objective.name):
            yield at("data.truncate", "split is for raw text: set it to left or right, or refuse")
    if model and objective and (unfit := _unfit(model.task, objective)):
        yield at("model.task", f"{model.task} does not suit objective {objective.name}, {unfit}")
    if model and model.quantize is not None:
        yield at("model.quantize", "is not served: leave it null")
