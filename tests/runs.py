"""Runs of a tiny random model for tests: their recipes, how they are stopped, and what is compared of them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from peftctl import methods, objectives, recipe, report, run, signals, trainer
from peftctl.plan import Options
from peftctl.schema import Recipe

CONFIGS = Path(__file__).parent.parent / "configs"
KINDS = ("messages", "preference", "unpaired", "labelled", "tagged")
DATA = {kind: f"{kind}.jsonl" for kind in KINDS}
# what an objective needs to be told
ASKED: dict[str, dict[str, Any]] = {
    "grpo": {"rewards": [{"name": "length", "characters": 30}], "group_size": 3, "max_new_tokens": 6}
}
# what a method needs on a base without biases
BLOCKS: dict[str, dict[str, Any]] = {
    "bitfit": {"add_missing": True},
    "lora": {"rank": 4, "target_modules": ["q_proj"]},
    "adalora": {"rank": 2, "initial_rank": 6, "interval": 1},
}
# what it needs to go on from an adapter that was written, where that leaves something out or a loss has more terms
CONTINUED: dict[str, dict[str, Any]] = {"p-tuning": {"encoder": "none"}, "adalora": {"orthogonality": 0.0}}
TIMINGS = ("seconds", "tokens_per_s")
LN2 = 0.6931471805599453


class Killed(Exception):
    """Stands for what ends a process without a word."""


def document(method: str = "lora", objective: str = "sft", /, **blocks: dict[str, Any]) -> dict[str, Any]:
    """A recipe of 4 steps of 2 x 2 of 7 examples: steps 1 and 3 lie inside an epoch, 2 and 4 on an epoch's edge."""
    plain: dict[str, Any] = {
        "model": {"name": str(CONFIGS / "models" / "tiny-llama.json"), "tokenizer": str(CONFIGS / "tokenizer")},
        "method": {"name": method, **BLOCKS.get(method, {})},
        "objective": {"name": objective, **ASKED.get(objective, {})},
        "data": {"train": str(data(objective)), "validation": 2 / 9, "limit": 9},
        "train": {"max_steps": 4, "batch_size": 2, "gradient_accumulation": 2, "learning_rate": 0.01, "eval_every": 2},
    }
    return {key: plain.get(key, {}) | blocks.get(key, {}) for key in plain}


def data(objective: str) -> Path:
    """Rows of a kind that an objective can learn from."""
    return CONFIGS / "data" / next(file for kind, file in DATA.items() if kind in objectives.get(objective).kinds)


def written(output: Path, contents: dict[str, Any]) -> Path:
    """The recipe as a file beside its run's folder."""
    path = output.with_suffix(".yaml")
    path.write_text(json.dumps(contents | {"output": str(output)}))
    return path


def loaded(output: Path, contents: dict[str, Any]) -> Recipe:
    return recipe.load(written(output, contents))


def train(output: Path, contents: dict[str, Any], verify: bool = False, **options: Any) -> dict[str, Any]:
    return run.train(loaded(output, contents), Options(quiet=True, verify=verify, **options))


@contextmanager
def stopped_after(step: int, output: Path) -> Iterator[None]:
    """SIGTERM as if it came during a step."""

    @contextmanager
    def caught() -> Iterator[Callable[[], int | None]]:
        yield lambda: signal.SIGTERM if done(output) >= step else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "caught", caught)
        yield


@contextmanager
def killed_in(micro_batch: int) -> Iterator[None]:
    """The process dies in a forward pass of training, counted from 1."""
    seen = 0
    loss = trainer.Question.loss

    def dying(self: trainer.Question, batch: Any) -> Any:
        nonlocal seen
        answer = loss(self, batch)
        seen += any(term.sum.requires_grad for term in answer.terms)
        if seen == micro_batch:
            raise Killed
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Question, "loss", dying)
        yield


def done(output: Path) -> int:
    return max((event["step"] for event in events(output) if event["event"] == "step"), default=0)


def events(output: Path) -> list[dict[str, Any]]:
    return report.read(output / "metrics.jsonl")


def untimed(output: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in event.items() if key not in TIMINGS} for event in events(output)]


def losses(output: Path) -> list[float]:
    return [event["loss"] for event in events(output) if event["event"] == "step"]


def even(loss: float) -> bool:
    """Whether a preference loss is that of a policy which answers as its reference does, but for their rounding.

    A reference that is remembered was asked in other batches, and some processors add those in another order.
    """
    return abs(loss - LN2) < 5e-7


def adapter(output: Path) -> dict[str, Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def bits(output: Path) -> dict[str, bytes]:
    """Everything that must not depend on how often a run was stopped."""
    paths = [output / "adapter" / "adapter_model.safetensors", *output.glob("checkpoints/*/*.safetensors")]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


def names() -> tuple[str, ...]:
    """The methods that need no head of a task."""
    return tuple(name for name in methods.names() if name != "head")
