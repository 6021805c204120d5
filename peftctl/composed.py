"""A recipe's document before it is checked: a file laid over what it extends, overrides over both, paths absolute."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftctl import functions
from peftctl.errors import Problem, RecipeError
from peftctl.located import DEEPEST, Node, Place, parse, read

INPUTS = (
    *(("model", "name"), ("model", "tokenizer"), ("data", "train"), ("data", "validation")),
    *(("method", "init_from"), ("objective", "reference"), ("data", "chat_template")),
)
WORDS = ("initial", "base")  # of objective.reference, which are no folders


class Files:
    """Reads each file once, however often it is extended; what can be told with other mistakes goes to `problems`."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        self.known: dict[Path, Node] = {}

    def extended(self, path: Path) -> Node:
        """A file laid over what it extends. Raises RecipeError with all that cannot be read."""
        unread: list[Problem] = []
        root = self._extended(path, (), unread)
        if unread:  # what they would have said is not missing
            raise RecipeError([*self.problems, *unread])
        return root

    def _extended(self, path: Path, chain: tuple[Path, ...], unread: list[Problem]) -> Node:
        own = path.resolve()
        if own not in self.known:
            try:
                root = _inputs(read(path, os.path.normpath(path), self.problems), path.parent)
            except RecipeError as error:
                unread.extend(error.problems)
                root = Node({}, Place(str(path)))
            under = Node({}, root.place)
            for entry in _entries(root.value.pop("extends", None)):
                try:
                    further = _extension(path.parent, entry, (*chain, own))
                except RecipeError as error:
                    unread.extend(error.problems)
                else:
                    under = merged(under, self._extended(further, (*chain, own), unread))
            self.known[own] = merged(under, root)
        return self.known[own]


def _entries(extends: Node | None) -> list[Node]:
    if extends is None:
        return []
    return extends.value if isinstance(extends.value, list) else [extends]


def _extension(folder: Path, entry: Node, chain: tuple[Path, ...]) -> Path:
    """The file that an entry of `extends` names; what is wrong with it is blamed on the entry."""
    if not isinstance(entry.value, str):
        raise RecipeError([entry.place.problem("extends is a file or a list of files")])
    path = found(folder, entry.value)
    if not _exists(path):
        raise RecipeError([entry.place.problem(f"extends: there is no file {os.path.normpath(path)}")])
    if path.resolve() in chain:
        names = " -> ".join(p.name for p in (*chain, path))
        raise RecipeError([entry.place.problem(f"extends: a circle, {names}")])
    if len(chain) > DEEPEST:
        raise RecipeError([entry.place.problem(f"extends: over {DEEPEST} files, one under the other")])
    return path


def found(folder: Path, name: str) -> Path:
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
        inside.value[key] = _absolute(node, key, folder)
    for entry in _list(root.at(("objective", "rewards"))):
        name = entry.at(("name",))
        if isinstance(name.value, str) and functions.is_one(name.value):
            path, _, function = name.value.rpartition(":")
            entry.value["name"] = Node(f"{found(folder, path).resolve()}:{function}", name.place, name.key)
    return root


def _list(node: Node) -> list[Node]:
    return [entry for entry in node.value if isinstance(entry.value, dict)] if isinstance(node.value, list) else []


def _absolute(node: Node, key: str, folder: Path) -> Node:
    """A value of an input with its paths made absolute: those of data may be several, or a mapping's."""
    if isinstance(node.value, str) and node.value and _is_path(key, node.value, folder):
        return Node(str(found(folder, node.value).resolve()), node.place, node.key)
    if isinstance(node.value, list):
        return Node([_absolute(one, key, folder) for one in node.value], node.place, node.key)
    if isinstance(node.value, dict) and "path" in node.value:
        inner = node.value | {"path": _absolute(node.value["path"], key, folder)}
        return Node(inner, node.place, node.key)
    return node


def _is_path(key: str, value: str, folder: Path) -> bool:
    """A model's name may be a hub id: what looks like a path or is there is one. A reference may be a word."""
    if key == "reference":
        return value not in WORDS
    if key == "chat_template":
        return not is_template_name(value)
    looks = value.startswith((".", "/", "~", "configs/")) or value.endswith((".gguf", ".json"))
    return key != "name" or looks or os.path.isdir(folder / value)


def is_template_name(value: str) -> bool:
    """Whether a chat template that ships with peftctl is meant, not a file."""
    return not any(mark in value for mark in "./\\")


def templates() -> dict[str, Path]:
    """The chat templates that ship with peftctl, by name."""
    return {path.stem: path for path in sorted((shared_folder("configs") / "templates").glob("*.jinja"))}


def overridden(texts: Sequence[str], problems: list[Problem]) -> Node:
    """All overrides as one document, so that a key counts with a name that is set after it."""
    root = Node({}, Place("--set"))
    for text in texts:
        try:
            root = merged(root, _override(text))
        except RecipeError as error:
            problems.extend(error.problems)
    return root


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
    return placed(key, relocated(node, place).value, place)


def placed(key: str, value: Any, place: Place) -> Node:
    """A document of one value, its path taken from the current directory."""
    node = Node(value, place, place)
    for part in reversed(key.split(".")):
        node = Node({part: node}, place, place)
    return _inputs(node, Path.cwd())


def relocated(node: Node, place: Place) -> Node:
    if isinstance(node.value, dict):
        return Node({key: relocated(inner, place) for key, inner in node.value.items()}, place, place)
    if isinstance(node.value, list):
        return Node([relocated(inner, place) for inner in node.value], place, place)
    return Node(node.value, place, place)


def merged(under: Node, over: Node, path: tuple[str, ...] = ()) -> Node:
    """Deep-merged, `over` wins. A block that names another method or objective replaces the whole block."""
    if not (isinstance(under.value, dict) and isinstance(over.value, dict)):
        return over
    if path in (("method",), ("objective",)) and "name" in under.value and "name" in over.value:
        if under.value["name"].value != over.value["name"].value:
            return over
    if path[:1] == ("data",) and ("path" in over.value or "hub" in over.value):
        return over  # another source, not a part of the one below
    both = dict(under.value)
    for key, node in over.value.items():
        both[key] = merged(both[key], node, (*path, key)) if key in both else node
    # a block that an option adds to stays where the file wrote it: that is where a missing key is looked for
    written = [node for node in (over, under) if node.place.line] or [over]
    return Node(both, written[0].place, written[0].key)


def shared_folder(name: str) -> Path:
    """`configs` or `recipes`: in the installed package, or beside it in a checkout."""
    installed = Path(__file__).parent / "_share" / name
    return installed if installed.is_dir() else Path(__file__).parent.parent / name
