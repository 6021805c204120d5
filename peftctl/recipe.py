"""A recipe: one strict, typed document. Every mistake in it is told in one go, each with its place and the remedy."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from peftctl import methods, objectives
from peftctl.blame import problems_of
from peftctl.errors import Problem, RecipeError, suggest
from peftctl.located import Node, Place, parse, read, write
from peftctl.methods.base import MethodConfig
from peftctl.schema import DataConfig, ModelConfig, Recipe, TrainConfig

INPUTS = (("model", "name"), ("model", "tokenizer"), ("data", "train"), ("data", "validation"), ("method", "init_from"))
BLOCKS: dict[str, type[BaseModel]] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
NAMED: dict[str, Any] = {"method": methods, "objective": objectives}
TOP = ("extends", "model", "method", "objective", "data", "train", "output")


def load(path: Path, overrides: Sequence[str] = (), smoke: bool = False) -> Recipe:
    """The recipe in a file with what it extends, smoke settings and overrides laid over it. Raises RecipeError."""
    root = _extended(Path(path))
    if smoke:
        root = merged(root, _extended(shared_folder("configs") / "smoke.yaml"))
    for override in overrides:
        root = merged(root, _override(override))
    if smoke:
        root = _with_rows(root)
    return _validated(root)


def method_block(name: str, overrides: Sequence[str] = ()) -> MethodConfig:
    """The method block that a name and overrides of `method.*` give. Raises RecipeError."""
    root = merged(Node({}, Place("--method")), _set("method.name", name, Place(f"--method {name}")))
    for override in overrides:
        root = merged(root, _override(override))
    stray = [node.key or node.place for key, node in root.value.items() if key != "method"]
    problems = [place.problem("only method.* can be set with --base and --method") for place in stray]
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
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "peftctl recipe",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def starter() -> str:
    """A recipe to begin with; it runs as it is."""
    return (shared_folder("recipes") / "starter.yaml").read_text("utf-8")


def shared_folder(name: str) -> Path:
    """`configs` or `recipes`: in the installed package, or beside it in a checkout."""
    installed = Path(__file__).parent / "_share" / name
    return installed if installed.is_dir() else Path(__file__).parent.parent / name


def merged(under: Node, over: Node, path: tuple[str, ...] = ()) -> Node:
    """Deep-merged, `over` wins. A block that names another method or objective replaces the whole block."""
    if not (isinstance(under.value, dict) and isinstance(over.value, dict)):
        return over
    if path in (("method",), ("objective",)) and "name" in under.value and "name" in over.value:
        if under.value["name"].value != over.value["name"].value:
            return over
    both = dict(under.value)
    for key, node in over.value.items():
        both[key] = merged(both[key], node, (*path, key)) if key in both else node
    return Node(both, over.place if over.place.line else under.place, over.key or under.key)


def _extended(path: Path, chain: tuple[Path, ...] = ()) -> Node:
    """A file laid over what it extends, its input paths made absolute."""
    root = _inputs(read(path, str(path)), path.parent)
    extends = root.value.pop("extends", None)
    under = Node({}, root.place)
    chain = (*chain, path.resolve())
    for entry in _entries(extends):
        under = merged(under, _extended(_extension(path.parent, entry, chain), chain))
    return merged(under, root)


def _entries(extends: Node | None) -> Iterator[Node]:
    if extends is None:
        return
    nodes = extends.value if isinstance(extends.value, list) else [extends]
    for node in nodes:
        if not isinstance(node.value, str):
            raise RecipeError([node.place.problem("extends is a file or a list of files")])
        yield node


def _extension(folder: Path, entry: Node, chain: tuple[Path, ...]) -> Path:
    """The file that an entry of `extends` names; what is wrong with it is blamed on the entry."""
    path = _found(folder, entry.value)
    if not _exists(path):
        raise RecipeError([entry.place.problem(f"extends: there is no file {path}")])
    if path.resolve() in chain:
        names = " -> ".join(p.name for p in (*chain, path))
        raise RecipeError([entry.place.problem(f"extends: a circle, {names}")])
    return path


def _found(folder: Path, name: str) -> Path:
    """A file beside the recipe; `configs/...` and `recipes/...` are also found where the package keeps them."""
    path = folder / os.path.expanduser(name)
    parts = [part for part in Path(name).parts if part != ".."]
    if not _exists(path) and parts and parts[0] in ("configs", "recipes"):
        shared = shared_folder(parts[0]).joinpath(*parts[1:])
        return shared if _exists(shared) else path
    return path


def _exists(path: Path) -> bool:
    """Whether there is such a file; not so where the name is too long for one."""
    return os.path.exists(path)


def _inputs(root: Node, folder: Path) -> Node:
    """Relative input paths made absolute: they are meant from where they are written."""
    for block, key in INPUTS:
        node = root.at((block, key))
        inside = root.value.get(block)
        if inside is None or not isinstance(inside.value, dict) or key not in inside.value:
            continue
        if isinstance(node.value, str) and _is_path(key, node.value, folder):
            absolute = str(_found(folder, node.value).resolve())
            inside.value[key] = Node(absolute, node.place, node.key)
    return root


def _is_path(key: str, value: str, folder: Path) -> bool:
    """A model's name may be a hub id: what looks like a path or is there is one."""
    looks = value.startswith((".", "/", "~", "configs/")) or value.endswith((".gguf", ".json"))
    return key != "name" or looks or os.path.isdir(folder / value)


def _override(text: str) -> Node:
    """`a.b=value` as a document of one value, blamed on the option."""
    key, equals, value = text.partition("=")
    place = Place(f"--set {text}")
    if not equals or not all(key.split(".")):
        raise RecipeError([place.problem("is not KEY=VALUE, as in --set train.max_steps=10")])
    if key.split(".")[0] == "extends":
        raise RecipeError([place.problem("extends can only be written in a file")])
    try:
        node = parse(value, place.file) if value.strip() else Node(None, place)
    except RecipeError as error:
        raise RecipeError([place.problem(problem.message) for problem in error.problems]) from None
    return _set(key, _relocated(node, place).value, place)


def _set(key: str, value: Any, place: Place) -> Node:
    """A document of one value, its path taken from the current directory."""
    node = Node(value, place, place)
    for part in reversed(key.split(".")):
        node = Node({part: node}, place, place)
    return _inputs(node, Path.cwd())


def _relocated(node: Node, place: Place) -> Node:
    if isinstance(node.value, dict):
        return Node({key: _relocated(inner, place) for key, inner in node.value.items()}, place, place)
    if isinstance(node.value, list):
        return Node([_relocated(inner, place) for inner in node.value], place, place)
    return Node(node.value, place, place)


def _with_rows(root: Node) -> Node:
    """A smoke run whose data is not on this machine takes the rows that ship with the package."""
    train = root.at(("data", "train"))
    if isinstance(train.value, str) and os.path.exists(train.value):
        return root
    name = root.at(("objective", "name")).plain()
    if name not in objectives.names():
        return root
    kind = "preference" if "preference" in objectives.get(name).kinds else "messages"
    rows = shared_folder("configs") / "data" / f"{kind}.jsonl"
    return merged(root, _set("data.train", str(rows), Place("--smoke")))


def _validated(root: Node) -> Recipe:
    problems = [
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
    if problems:
        raise RecipeError(sorted(problems, key=lambda p: (p.file, p.line, p.column)))
    assert output is not None
    recipe = Recipe(output=output.value, **blocks)
    conflicts = list(_conflicts(recipe, root))
    if conflicts:
        raise RecipeError(conflicts)
    return recipe


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


def _conflicts(recipe: Recipe, root: Node) -> Iterator[Problem]:
    """What is right alone and wrong together. By traits, never by a method's name."""
    traits = methods.get(recipe.method.name).traits(recipe.method)
    objective = objectives.get(recipe.objective.name)
    train, data = recipe.train, recipe.data

    def at(*path: str) -> Place:
        return root.at(path).place

    if traits.needs_cache and train.gradient_checkpointing:
        yield at("train", "gradient_checkpointing").problem(
            f"train.gradient_checkpointing would lose method {recipe.method.name}'s virtual tokens: set it to false"
        )
    if train.max_steps is not None and train.epochs is not None:
        yield at("train", "epochs").problem("train.epochs and train.max_steps are both given: keep one")
    if train.max_steps is not None and train.warmup > train.max_steps:
        yield at("train", "warmup").problem(f"train.warmup is {train.warmup:g} of {train.max_steps} steps: lower it")
    if train.warmup >= 1 and not train.warmup.is_integer():
        yield at("train", "warmup").problem(
            f"train.warmup {train.warmup:g} is neither a fraction nor a number of steps"
        )
    if train.eval_every is not None and data.validation is None:
        yield at("train", "eval_every").problem("train.eval_every has nothing to evaluate: set data.validation")
    if data.format != "auto" and data.format not in objective.kinds:
        kinds = " or ".join(sorted(objective.kinds))
        yield at("data", "format").problem(
            f"data.format {data.format} does not suit objective {objective.name}, which learns from {kinds}"
        )
    if recipe.model.task != "causal-lm":
        yield at("model", "task").problem(f"model.task {recipe.model.task!r} is not served; causal-lm is")
    if recipe.model.quantize is not None:
        yield at("model", "quantize").problem("model.quantize is not served: leave it null")
    if train.compile:
        yield at("train", "compile").problem("train.compile is not served: leave it false")
