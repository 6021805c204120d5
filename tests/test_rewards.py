"""Rewards say what an answer is worth, and refuse what they cannot judge by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftctl import functions
from peftctl.errors import InputError, TrainingError
from peftctl.rewards import Reward, scores


@pytest.mark.parametrize(
    ("reward", "completion", "expected"),
    [
        ({"name": "exact"}, " Eight.\n", 1),
        ({"name": "exact"}, "eight.", 0),
        ({"name": "exact", "pattern": r"is (\S+)"}, "It is nine. No, it is Eight.", 1),  # the last that is found
        ({"name": "exact", "pattern": r"is (\S+)"}, "Eight.", 0),
        ({"name": "exact", "pattern": r"Eight\.|(nine)"}, "Eight.", 0),
        ({"name": "json"}, '{"a": [1, 2]}', 1),
        ({"name": "json"}, " [] ", 1),
        ({"name": "json"}, "8", 0),
        ({"name": "json"}, '{"a": NaN}', 0),
        ({"name": "json"}, '{"a": 1} and more', 0),
        ({"name": "json"}, "[" * 100_000, 0),
        ({"name": "length", "characters": 10}, "x" * 10, 1),
        ({"name": "length", "characters": 10}, "x" * 5, 0.5),
        ({"name": "length", "characters": 10}, "x" * 16, 0.625),
        ({"name": "length", "characters": 10}, "x" * 40, 0.25),
        ({"name": "length", "characters": 10}, "", 0),
        ({"name": "regex", "pattern": "^[A-Z]"}, "Eight", 1),
        ({"name": "regex", "pattern": "^[A-Z]"}, "eight", 0),
    ],
)
def test_an_answer_is_worth(reward: dict[str, Any], completion: str, expected: float) -> None:
    assert Reward(**reward).score()("How many?", completion, "Eight.") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ({"name": "regx", "pattern": "a"}, "there is no reward 'regx'; did you mean regex?"),
        ({"name": "regex"}, "the reward regex needs pattern"),
        ({"name": "length"}, "the reward length needs characters"),
        ({"name": "json", "pattern": "a"}, "the reward json has no pattern"),
        ({"name": "regex", "pattern": "a", "characters": 3}, "the reward regex has no characters"),
        ({"name": "regex", "pattern": "(a"}, "is no regular expression"),
        ({"name": "exact", "pattern": "a"}, "has no group"),
        ({"name": "json", "weight": float("inf")}, "finite"),
    ],
)
def test_a_reward_that_cannot_judge_is_refused(reward: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("?", r"\?")):
        Reward(**reward)


def test_two_of_one_kind_are_told_apart() -> None:
    twice = tuple(Reward(name="length", characters=n, weight=n) for n in (3, 5))
    found = scores((*twice, Reward(name="json")))
    assert {name: weight for name, (weight, _) in found.items()} == {"length": 3, "length#2": 5, "json": 1}
    with pytest.raises(InputError, match="every weight is 0"):
        scores((Reward(name="json", weight=0.0),))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(
        "def vowels(prompt, completion, answer):\n    return sum(map(completion.count, 'aeiou'))\n"
        "def fails(prompt, completion, answer):\n    return 1 / 0\n"
        "def word(prompt, completion, answer):\n    return 'good'\n"
        "def endless(prompt, completion, answer):\n    return float('nan')\n"
    )
    return path


def test_a_function_of_ones_own(own: Path) -> None:
    reward = Reward(name=f"{own}:vowels")
    assert reward.label == "vowels" and reward.score()("q", "banana", None) == 3.0
    for name, said in (("fails", "ZeroDivisionError"), ("word", "'good'"), ("endless", "nan")):
        with pytest.raises(TrainingError, match=f"{name} .*{said}"):
            Reward(name=f"{own}:{name}").score()("q", "banana", None)


def test_it_is_found_without_being_run_and_run_only_when_trusted(own: Path, tmp_path: Path) -> None:
    loud = tmp_path / "loud.py"
    loud.write_text("raise SystemExit('was run')\ndef f(prompt, completion, answer): ...\n")
    before = functions.checked([f"{loud}:f"])
    with pytest.raises(InputError, match=r"wants to run .*loud\.py:f: read it, and allow it with --trust-recipe-code"):
        functions.checked([f"{loud}:f"], trusted=False)
    with pytest.raises(InputError, match="cannot be loaded: SystemExit: was run"):
        functions.load(f"{loud}:f")
    loud.write_text(loud.read_text() + "\n")
    assert functions.checked([f"{loud}:f"]) != before
    for name, said in (
        (f"{own}:vowel", "did you mean vowels"),
        (f"{tmp_path}/no.py:f", "cannot be read: No such file"),
    ):
        with pytest.raises(InputError, match=said):
            functions.checked([name])
    own.write_text("def f(:")
    with pytest.raises(InputError, match="is not Python"):
        functions.checked([f"{own}:f"])
