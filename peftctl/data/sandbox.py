"""Jinja in a sandbox that also bounds work and size: a chat template is a stranger's program.

jinja's sandbox keeps a template from Python's insides, not from looping for ever or from filling the memory. Here every
turn of a loop, call, filter and operator that can make much of little spends from a budget, and what would be longer
than a dialogue may be is refused before it is made.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

LONGEST = 1_000_000  # characters of one rendered dialogue, and of any text or list on the way to it
WORK = 1_000_000  # turns of loops, calls, items looked at; 16 characters count as one
SECONDS = 1.5  # of the processor, for what the budget does not see
BITS = 100_000  # of a whole number
WIDE = re.compile(r"[0-9]{6,}|:[^{}]*\{|%[^a-zA-Z%]*\*")  # in a format: wide fields, or widths that come from outside
PASSED_BY = {  # filters that look at their items one by one, or not at all, and print none
    *("length", "count", "first", "last", "list", "select", "reject", "selectattr", "rejectattr", "map", "reverse"),
    *("default", "d", "items", "attr", "sort", "groupby", "batch", "slice", "min", "max", "sum", "unique", "dictsort"),
}


class Spent(SecurityError):
    """A template that does not come to an end."""


class Generator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment whose templates spend a budget, which `begin` fills."""

    code_generator_class = Generator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.begin()
        del self.globals["lipsum"]
        self.finalize = self.printed
        self.concat = self.joined  # type: ignore[method-assign]
        self.filters = {name: self.guarded(name, one) for name, one in self.filters.items()}

    def begin(self) -> None:
        """A new rendering, with all of the budget."""
        self.left = WORK
        self.checked = WORK
        self.until = time.thread_time() + SECONDS

    def spend(self, work: int) -> None:
        self.left -= 1 + work
        if self.left < self.checked - WORK // 100:
            self.checked = self.left
            if self.left < 0 or time.thread_time() > self.until:
                raise Spent("it does more than any dialogue needs; does a loop of it ever end?")

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        for loop in source.find_all(nodes.For):
            turn = nodes.Call(nodes.EnvironmentAttribute("turn"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(turn).set_lineno(loop.lineno).set_environment(self))
        return super()._generate(source, name, filename, defer_init)

    def turn(self) -> None:
        """Called at each turn of a loop, and paid for as every call is."""

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # jinja wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        __self.spend(0)
        if isinstance(owner, str | bytes | int):
            args = _listed(args)
            __self.bound(name, (owner, *args, *kwargs.values()))
        return __self.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is str and type(right) is str:  # nine of ten, and all of a dialogue's text
            self.room(len(left) + len(right))
            return left + right
        sizes = [_size(value) for value in (left, right)]
        if operator == "%" and isinstance(left, str):
            self.bound("format", (left, right))
        elif operator == "+" and None not in sizes:
            self.room(sum(map(int, filter(None, sizes))))
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > BITS:
                raise SecurityError("it computes a number too large to be one of a dialogue")
        elif operator == "*":
            self.room(next((size * times for size, times in zip(sizes, (right, left), strict=True) if size), 0))
        return self.made(super().call_binop(context, operator, left, right))

    def joined(self, parts: Iterable[Any]) -> str:
        parts = list(parts)
        self.room(sum(self.length(part) for part in parts))
        return "".join(map(str, parts))

    def printed(self, value: Any) -> Any:
        self.room(self.length(value))
        return value

    def guarded(self, name: str, one: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that spends for what it is given and what it makes."""

        @wraps(one)
        def filtered(*args: Any, **kwargs: Any) -> Any:
            if name in PASSED_BY:
                parts = [abs(value) for value in (*args[1:], *kwargs.values()) if isinstance(value, int)]
                self.room(max(parts, default=0))  # of a slice, or items of a batch that are filled in
                self.spend(sum(_size(value) or 0 for value in args) + sum(parts))
            else:
                args = _listed(args)
                values = (*args, *kwargs.values())
                self.bound(name, tuple(value for value in values if isinstance(value, _SEEN)))
            return self.made(one(*args, **kwargs))

        return filtered

    def bound(self, name: str, values: Sequence[Any]) -> None:
        """Refuse what a filter or a text's method would make too much of; `values`: what it works on, then the rest."""
        first, *rest = values or ("",)
        if any(isinstance(value, int) and abs(value) > LONGEST for value in rest):
            raise SecurityError(f"{name} is given a number over {LONGEST:,}")
        if name in ("translate", "maketrans") or (name.startswith("format") and WIDE.search(str(first))):
            raise SecurityError(f"it may not use {name} in this way")
        self.room(sum(map(self.length, values)) + _repeated(name, first, rest))

    def room(self, size: int) -> None:
        if size > LONGEST:
            raise SecurityError(f"it makes a text or a list longer than {LONGEST:,}")
        self.spend(size // 16)

    def made(self, value: Any) -> Any:
        size = _size(value)
        if size is not None:
            self.room(size)
        return value

    def length(self, value: Any) -> int:
        """About how long a value is when it is printed. Spends for each item, so it ends."""
        if isinstance(value, str | bytes):
            return len(value)
        self.spend(0)
        if isinstance(value, Namespace):
            value = value._Namespace__attrs
        if isinstance(value, Mapping):
            return sum(self.length(key) + self.length(item) for key, item in value.items())
        if isinstance(value, list | tuple | set | frozenset):
            return sum(map(self.length, value))
        return 8 * len(value) if isinstance(value, range) else 8


def _listed(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """What comes item by item as a list, so that it can be measured."""
    return tuple(list(value) if isinstance(value, Iterator) else value for value in values)


def _repeated(name: str, first: Any, rest: Sequence[Any]) -> int:
    """Characters that come of an argument's being written many times."""
    widths = [value if isinstance(value, int) else _size(value) or 0 for value in rest] or [0]
    if name == "join":
        return max((_size(first) or 0) * widths[0], 0)
    if not isinstance(first, str):
        return 0
    if name == "replace" and len(rest) > 1 and isinstance(rest[0], str):
        return first.count(rest[0]) * widths[1]
    times = {"indent": first.count("\n") + 1, "expandtabs": first.count("\t"), "wordwrap": len(first)}
    return times.get(name, 0) * max(widths)


_SEEN = (str, bytes, int, float, list, tuple, dict, set, frozenset, range, Namespace)


def _size(value: Any) -> int | None:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict | set | frozenset | range) else None
