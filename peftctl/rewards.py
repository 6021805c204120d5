"""Reward functions: how good an answer is, as a number that a program can find out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from peftctl import functions
from peftctl.errors import InputError, TrainingError, suggest

# of a prompt, an answer to it, and the answer that the data gives, if any
Score = Callable[[str, str, "str | None"], float]

NEEDS: dict[str, str | None] = {"exact": None, "json": None, "length": "characters", "regex": "pattern"}


class Reward(BaseModel):
    """One entry of `objective.rewards`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    name: str = Field(description="exact, json, length, regex, or FILE.py:FUNCTION")
    weight: float = Field(1.0, description="what it counts in the sum of the rewards; below 0 a penalty")
    pattern: str | None = Field(
        None, min_length=1, description="of regex: what is looked for; of exact: its first group is what must be equal"
    )
    characters: int | None = Field(None, ge=1, description="of length: the length that is wanted")

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Reward:
        needed = NEEDS.get(self.name)
        known = ("pattern",) if self.name == "exact" else (needed,)
        if self.name not in NEEDS and not functions.is_one(self.name):
            raise ValueError(
                f"there is no reward {self.name!r}{suggest(self.name, NEEDS)}; "
                f"there are {', '.join(NEEDS)}, and FILE.py:FUNCTION"
            )
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"the reward {self.name} needs {needed}")
        for key in ("pattern", "characters"):
            if key not in known and getattr(self, key) is not None:
                raise ValueError(f"the reward {self.name} has no {key}")
        _compiled(self)
        return self

    @property
    def label(self) -> str:
        """What its mean is called in the log."""
        return self.name.rpartition(":")[2]

    @property
    def compares(self) -> bool:
        """Whether it needs the answer that the data gives."""
        return self.name == "exact"

    def score(self) -> Score:
        """The function. Raises InputError where it is a user's and cannot be loaded."""
        pattern = _compiled(self)
        if functions.is_one(self.name):
            return _guarded(functions.load(self.name), self.name)
        if self.name == "json":
            return lambda prompt, completion, answer: float(_is_json(completion))
        if self.name == "length":
            wanted = self.characters or 1
            return lambda prompt, completion, answer: min(len(completion), wanted) / max(len(completion), wanted)
        if self.name == "regex":
            assert pattern is not None
            return lambda prompt, completion, answer: float(pattern.search(completion) is not None)
        return lambda prompt, completion, answer: float(_said(completion, pattern) == (answer or "").strip())


def _compiled(reward: Reward) -> re.Pattern[str] | None:
    if reward.pattern is None:
        return None
    try:
        pattern = re.compile(reward.pattern)
    except re.error as error:
        raise ValueError(f"pattern {reward.pattern!r} is no regular expression: {error}") from None
    if reward.name == "exact" and not pattern.groups:
        raise ValueError(f"pattern {reward.pattern!r} has no group (...), which is what the answer is compared with")
    return pattern


def _said(completion: str, pattern: re.Pattern[str] | None) -> str | None:
    """What is compared with the answer: all of it, or what the pattern's first group finds last."""
    if pattern is None:
        return completion.strip()
    found = [match.group(1) for match in pattern.finditer(completion)]
    return found[-1].strip() if found and found[-1] is not None else None


def _is_json(text: str) -> bool:
    """Whether a text is a JSON object or list; a bare number or word in quotes is none."""
    try:
        return isinstance(json.loads(text, parse_constant=_no_constant), dict | list)
    except (ValueError, RecursionError):
        return False


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _guarded(function: Callable[..., Any], name: str) -> Score:
    """A user's function `f(prompt, completion, answer)`, which must answer a finite number."""

    def score(prompt: str, completion: str, answer: str | None) -> float:
        try:
            found = function(prompt=prompt, completion=completion, answer=answer)
        except Exception as error:  # a user's program can fail in any way
            raise TrainingError(
                f"the reward {name} fails on the answer {completion[:60]!r}: {type(error).__name__}: {error}"
            ) from error
        if isinstance(found, bool | int | float) and math.isfinite(found):
            return float(found)
        raise TrainingError(f"the reward {name} answers {found!r} to {completion[:60]!r}; a finite number is meant")

    return score


def names(rewards: tuple[Reward, ...]) -> list[str]:
    """What each reward is called in the log: of those with one label, the second one `label#2`."""
    labels = [reward.label for reward in rewards]
    numbers = [labels[: place + 1].count(label) for place, label in enumerate(labels)]
    return [label if n == 1 else f"{label}#{n}" for label, n in zip(labels, numbers, strict=True)]


def scores(rewards: tuple[Reward, ...]) -> dict[str, tuple[float, Score]]:
    """Of each reward, by the name in the log, its weight and function. Raises InputError."""
    found = {name: (own.weight, own.score()) for name, own in zip(names(rewards), rewards, strict=True)}
    if not any(weight for weight, _ in found.values()):
        raise InputError("objective.rewards: every weight is 0, so no answer is better than another")
    return found
