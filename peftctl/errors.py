"""What can go wrong, as a small tree; each class knows the exit code it ends the command with.

PeftctlError                  1   failed while running
├── TrainingError             1   the numbers went wrong: NaN, nothing moved, out of memory
├── SaveError                 1   a file could not be written whole
├── Stopped             130/143   SIGINT or SIGTERM, with a resumable checkpoint behind it
└── InputError                2   what the user gave is wrong; found before any time is spent
    ├── RecipeError           2   one or more `Problem`s, each with its place
    ├── DataError             2   a row or a file of data
    │   └── NoLabel           2   a row of which nothing would be learnt
    ├── TargetError           2   `target_modules` and the like match nothing, or the wrong thing
    ├── ModelError            2   a base that is missing, gated, broken or of the wrong kind
    ├── FormatError           2   a file that is not what it should be
    └── Unfoldable            2   a change that no plain weight can hold
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class PeftctlError(Exception):
    """Every error a user may see: one line that says what was asked, what was found and what to do."""

    exit_code = 1


class TrainingError(PeftctlError):
    pass


class SaveError(PeftctlError):
    pass


class Stopped(PeftctlError):
    """Raised after the step was finished and saved; `signal_number` decides the exit code."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class InputError(PeftctlError):
    exit_code = 2


class Problem(NamedTuple):
    """One mistake and its place. `line` and `column` count from 1; 0 where the place has none (`--set`)."""

    file: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return f"{place}: {self.message}"


class RecipeError(InputError):
    """All the problems of a recipe in one go."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


class DataError(InputError):
    pass


class NoLabel(DataError):
    pass


class TargetError(InputError):
    pass


class ModelError(InputError):
    pass


class FormatError(InputError):
    pass


class Unfoldable(InputError):
    pass


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest known word, or nothing when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def several(faults: Sequence[str], most: int = 5) -> str:
    """The first faults in one line, and how many more there are."""
    return "; ".join(faults[:most]) + (f" and {len(faults) - most} more" if len(faults) > most else "")
