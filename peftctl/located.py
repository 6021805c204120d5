"""YAML with places: every value knows its file, line and column, and nothing but plain data is let in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml.reader import ReaderError

from peftctl.errors import Problem, RecipeError, suggest

LARGEST = 1 << 20  # bytes of a recipe
DEEPEST = 20
MOST = 5000  # values; the reader takes some 50 microseconds for each
INTEGER = re.compile(r"[-+]?[0-9]{1,300}")  # longer ones are read as floats, which may be infinite
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # no file name and no UTF-8 text can hold them
BREAKS = re.compile("[\x85\u2028\u2029]")  # line breaks to YAML, which only double quotes keep
FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
WORDS: dict[str, Any] = {"": None, "~": None, "null": None, "true": True, "True": True, "false": False, "False": False}


class Place(NamedTuple):
    file: str
    line: int = 0  # from 1; 0 where there is none
    column: int = 0

    def problem(self, message: str) -> Problem:
        # what is quoted from a file may hold line ends and codes that move a terminal's cursor
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        return Problem(self.file, self.line, self.column, line)


@dataclass(frozen=True)
class Node:
    """A value and where it was written. `key`: where its key was. Mappings and lists hold nodes."""

    value: Any
    place: Place
    key: Place | None = None

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {name: node.plain() for name, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def at(self, path: tuple[Any, ...]) -> Node:
        """The node at a path of keys, or the deepest one on the way there."""
        node = self
        for step in path:
            try:
                node = node.value[step]
            except (KeyError, IndexError, TypeError):
                return node
        return node


def read(path: Path, shown: str, also: list[Problem] | None = None) -> Node:
    """The document in a file, named `shown` in messages; `also` as in `parse`. Raises RecipeError."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise RecipeError(
                [Place(shown).problem(f"the file has over {LARGEST >> 20} MiB; a recipe has a few lines")]
            )
        text = content.decode("utf-8")
    except OSError as error:
        raise RecipeError([Place(shown).problem(f"cannot be read: {error.strerror}{_near(path)}")]) from None
    except UnicodeDecodeError as error:
        raise RecipeError([Place(shown).problem(f"is not UTF-8 at byte {error.start}")]) from None
    node = parse(text, shown, also)
    if not isinstance(node.value, dict):
        raise RecipeError([node.place.problem("a recipe is a mapping of keys to values, this is not")])
    return node


def _near(path: Path) -> str:
    """The file beside it that may be meant, where it is not there."""
    try:
        return "" if path.exists() else suggest(path.name, (one.name for one in path.parent.iterdir()))
    except OSError:
        return ""


def parse(text: str, file: str, also: list[Problem] | None = None) -> Node:
    """The document in a text. Raises RecipeError at the first thing that is no plain YAML.

    Keys that cannot be used (given twice, or no words) go to `also`, so that they are told together with what else is
    wrong; without it they are raised.
    """
    try:
        _screen(text, file)
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(file, mark.line + 1, mark.column + 1) if mark else Place(file)
        hint = "; indent with spaces" if "\\t" in str(error.problem) else ""
        raise RecipeError([place.problem(f"is not YAML: {error.problem}{hint}")]) from None
    except ReaderError as error:
        before = text[: error.position].split("\n")
        place = Place(file, len(before), len(before[-1]) + 1)
        raise RecipeError([place.problem(f"the character U+{ord(text[error.position]):04X} is not allowed")]) from None
    if root is None:
        return Node({}, Place(file, 1, 1))
    problems: list[Problem] = []
    node = _node(root, file, None, problems)
    if problems and also is None:
        raise RecipeError(problems)
    (also if also is not None else problems).extend(problems)
    return node


def _screen(text: str, file: str) -> None:
    """Refuse aliases, anchors, tags and depth on the stream of events, before anything is built."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.BaseLoader)):
        mark: Any = event.start_mark
        place = Place(file, mark.line + 1, mark.column + 1)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise RecipeError([place.problem("anchors and aliases (& and *) are not allowed: write the value out")])
        if getattr(event, "tag", None):
            raise RecipeError(
                [place.problem(f"the tag {getattr(event, 'tag', '')} is not allowed: write a plain value")]
            )
        if isinstance(event, yaml.ScalarEvent) and NO_TEXT.search(event.value):
            raise RecipeError([place.problem("holds a null character or half a surrogate pair: leave it out")])
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise RecipeError([place.problem(f"is nested over {DEEPEST} deep")])
        if count > MOST:
            raise RecipeError([place.problem(f"the file has over {MOST} values; a recipe has a few dozen")])


def _node(raw: Any, file: str, key: Place | None, problems: list[Problem]) -> Node:
    place = Place(file, raw.start_mark.line + 1, raw.start_mark.column + 1)
    if isinstance(raw, yaml.ScalarNode):
        return Node(scalar(raw.value) if raw.style is None else raw.value, place, key)
    if isinstance(raw, yaml.SequenceNode):
        return Node([_node(item, file, None, problems) for item in raw.value], place, key)
    return Node(dict(_entries(raw, file, problems)), place, key)


def _entries(raw: Any, file: str, problems: list[Problem]) -> Iterator[tuple[str, Node]]:
    seen: dict[str, int] = {}
    for name, value in raw.value:
        place = Place(file, name.start_mark.line + 1, name.start_mark.column + 1)
        if not isinstance(name, yaml.ScalarNode):
            problems.append(place.problem("a key is a word"))
        elif name.value in seen:
            problems.append(place.problem(f"{name.value} stands here again; it was set in line {seen[name.value]}"))
        else:
            seen[name.value] = place.line
            yield name.value, _node(value, file, place, problems)


def scalar(text: str) -> Any:
    """An unquoted value: null, true, false, a number (1e-4 is one), or text. Yes, no, on and off are text."""
    if text in WORDS:
        return WORDS[text]
    if INTEGER.fullmatch(text):
        return int(text)
    if FLOAT.fullmatch(text):
        return float(re.sub(r"\.(?=[iInN])", "", text))
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes what `scalar`, unlike YAML 1.1, takes for a number (1e5, 09); writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        plain = isinstance(scalar(data), str) and not BREAKS.search(data)
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if plain else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def write(value: Any) -> str:
    """Plain data as YAML that `parse` reads back."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text
