"""From pydantic's findings to plain sentences, each at the place where the value was written."""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from peftctl.errors import Problem, suggest
from peftctl.located import Node

MEANT = {
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "null",
    "finite_number": "a finite number",
}
BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def problems_of(cls: type[BaseModel], node: Node, key: str) -> tuple[BaseModel | None, list[Problem]]:
    """The block as `cls` reads it, or what is wrong with it: one problem for each value."""
    try:
        return cls.model_validate(node.plain()), []
    except ValidationError as error:
        grouped: dict[tuple[Any, ...], list[Any]] = {}
        for detail in error.errors(include_url=False):
            grouped.setdefault(_path(detail["loc"], node), []).append(detail)
        # what holds a wrong item is not also refused for being no text, the union's other branch
        paths = [path for path in grouped if not any(path and path == other[: len(path)] != other for other in grouped)]
        return None, [_problem(cls, node, key, path, grouped[path]) for path in paths]


def _path(loc: tuple[Any, ...], node: Node) -> tuple[Any, ...]:
    """The keys of a location: pydantic adds the branch of a union that it tried, which no document has."""
    path: list[Any] = []
    for index, step in enumerate(loc):
        value = node.value
        there = step in value if isinstance(value, dict) else isinstance(step, int) and isinstance(value, list)
        if there:
            path.append(step)
            node = value[step]
        elif index == 0:
            path.append(step)  # a missing key
    return tuple(path)


def _problem(cls: type[BaseModel], node: Node, key: str, path: tuple[Any, ...], details: list[Any]) -> Problem:
    found = node.at(path)
    name = ".".join([key, *map(str, path)])
    # a block's own words tell more than that it is no text, the union's other branch
    detail = next((one for one in details if one["type"] in ("value_error", "assertion_error")), details[0])
    kind = detail["type"]
    if kind == "extra_forbidden":
        entry = _entry_of(cls, path[:-1])
        fields = _fields(cls, detail["loc"]) if entry is cls else list(entry.model_fields)
        near = suggest(str(path[-1]), fields) or f"; there are {', '.join(fields)}"
        return (found.key or found.place).problem(f"{name} is not a key{near}")
    if kind == "missing":
        inside = len(path) > 1  # of an entry in a list, where `_path` ends
        missing = str(details[0]["loc"][-1])
        name = f"{name}.{missing}" if inside else name
        description = (_entry_of(cls, path) if inside else cls).model_fields[missing].description
        place = found.place if inside else node.key or node.place
        return place.problem(f"{name} is missing" + (f": {description}" if description else ""))
    if kind in ("value_error", "assertion_error"):
        return (found.key or found.place).problem(f"{name}: {_plainly(detail['msg'])}")
    wanted = " or ".join(dict.fromkeys(map(_wanted, details)))
    quotes = " (put it in quotes)" if wanted == "text" and isinstance(found.value, bool | int | float) else ""
    near = suggest(str(found.plain()), re.findall(r"'([^']*)'", str(details[0].get("ctx", {}).get("expected", ""))))
    return found.place.problem(f"{name} is {_shown(found)}; {wanted} is meant{quotes}{near}")


def _fields(cls: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The keys of the block that a location is in: `cls`, or one of its inner ones, which pydantic names."""
    left: list[Any] = [field.annotation for field in cls.model_fields.values()]
    while left:
        annotation = left.pop()
        left += get_args(annotation)
        name = getattr(annotation, "__name__", "")
        if hasattr(annotation, "model_fields") and any(re.search(rf"\b{name}\b", str(step)) for step in location):
            return list(annotation.model_fields)
    return list(cls.model_fields)


def _entry_of(cls: type[BaseModel], path: tuple[Any, ...]) -> type[BaseModel]:
    """What a block's value at a path is validated as; the block itself where that is no model of its own."""
    for step in path:
        if isinstance(step, str) and step in cls.model_fields:
            inner = get_args(cls.model_fields[step].annotation)
            cls = next((one for one in inner if isinstance(one, type) and issubclass(one, BaseModel)), cls)
    return cls


def _wanted(detail: dict[str, Any]) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in MEANT:
        return MEANT[kind]
    if kind in BOUNDS:
        limit, word = BOUNDS[kind]
        return f"a number {word} {context[limit]}"
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    if (kind == "too_short" and context.get("min_length") == 1) or kind == "string_too_short":
        return "something not empty"
    if kind in ("too_short", "too_long"):
        return f"a list of {context.get('min_length', context.get('max_length'))}"
    return _plainly(detail["msg"])


def _plainly(message: str) -> str:
    """A message of pydantic's without its phrases."""
    return re.sub(r"^(Value error, |Assertion failed, |Input should (be |have )?(a valid )?)", "", message)


def _shown(node: Node) -> str:
    value = node.plain()
    text = {True: "true", False: "false", None: "null"}.get(value, None) if isinstance(value, bool | None) else None
    text = text or repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
