"""Python functions that a recipe names, `FILE.py:FUNCTION`: found without running anything, run only when trusted."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peftctl.errors import InputError, suggest

FLAG = "--trust-recipe-code"


def is_one(name: str) -> bool:
    """Whether a name means a function in a file."""
    return ".py:" in name


def checked(names: Sequence[str], trusted: bool = True) -> dict[str, str]:
    """Of each name the sha256 of its file. Nothing is run.

    Raises InputError where a file or a function is missing; and, unless they are `trusted`, where there is any.
    """
    found = {name: _fingerprint(name) for name in names}
    if found and not trusted:
        raise InputError(
            f"the recipe wants to run {', '.join(found)}: read it, and allow it with {FLAG} on the command line"
        )
    return found


def load(name: str) -> Callable[..., Any]:
    """The function; its file is run. Raises InputError for whatever goes wrong in that."""
    path, function = _parts(name)
    spec = importlib.util.spec_from_file_location(f"peftctl_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        found = getattr(module, function)
    except (Exception, SystemExit) as error:  # a user's program can fail in any way
        raise InputError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise InputError(f"{name} is no function")
    return found  # type: ignore[no-any-return]


def _parts(name: str) -> tuple[Path, str]:
    path, _, function = name.rpartition(":")
    return Path(path), function


def _fingerprint(name: str) -> str:
    path, function = _parts(name)
    try:
        source = path.read_bytes()
        tree = ast.parse(source)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{path} is not Python: {error}") from None
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if function not in defined:
        raise InputError(f"{path} defines no function {function!r}{suggest(function, defined)}")
    return hashlib.sha256(source).hexdigest()
