"""The reward model's loss: Bradley and Terry's by hand, TRL's by its own trainer, and what a run makes of it."""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from peftctl import opened
from peftctl.batch import Batch, build
from peftctl.data.chat import Chat
from peftctl.errors import DataError, InputError, RecipeError
from peftctl.evaluation import evaluate
from peftctl.objectives import get
from peftctl.row import Example, judged
from tests import runs
from tests.objectives.paired import pairs

REWARD = get("reward")
PAIRS = runs.CONFIGS / "data" / "preference.jsonl"
ASKED = {"model": {"task": "sequence-classification"}}


class Scores:
    """A policy that answers the given scores, one a row."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    def row_scores(self, batch: Batch) -> Tensor:
        return self.scores[:, None]


def judged_pairs(n: int) -> Batch:
    return build([judged(row.ids, example=row.example, role=row.role) for row in pairs(n).rows])


def value(scores: Tensor, batch: Batch, **settings: Any) -> tuple[Tensor, dict[str, float]]:
    config = REWARD.config(name="reward", **settings)
    found = REWARD.loss(Scores(scores), None, batch, config)
    weights = REWARD.weights(batch, config)
    total: Any = sum(t.coefficient * t.sum / w for t, w in zip(found.terms, weights, strict=True))
    return total, {name: float(s / n) for name, (s, n) in found.metrics.items()}


def test_by_hand() -> None:
    scores = torch.tensor([2.0, -1.0, 0.5, 1.5], dtype=torch.float64)
    loss, metrics = value(scores, judged_pairs(2))
    assert float(loss) == pytest.approx((math.log1p(math.exp(-3)) + math.log1p(math.exp(1))) / 2)
    assert metrics == {"accuracy": 0.5, "margin": 1.0, "mean_score": 0.75}
    centred, _ = value(scores, judged_pairs(2), center_rewards=0.1)
    assert float(centred - loss) == pytest.approx(0.1 * (1 + 4) / 2)
    assert float(value(torch.zeros(4), judged_pairs(2))[0]) == pytest.approx(math.log(2))


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_as_trl_has_it(coefficient: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import RewardTrainer
    batch = judged_pairs(5)
    scores = torch.randn(10, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    order = [*batch.role("chosen").tolist(), *batch.role("rejected").tolist()]
    trainer = object.__new__(RewardTrainer)
    trainer.model = SimpleNamespace(training=False)
    trainer.args = SimpleNamespace(center_rewards_coefficient=coefficient or None)
    trainer.accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer._metrics, trainer._total_train_tokens = {"eval": defaultdict(list)}, 0
    inputs = {"attention_mask": torch.ones(10, 3)}
    expected = trainer.compute_loss(lambda **inputs: SimpleNamespace(logits=scores[order][:, None]), inputs)
    loss, metrics = value(scores, batch, center_rewards=coefficient)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    ours, theirs = (torch.autograd.grad(x, scores, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    for name, told in (("accuracy", "accuracy"), ("margin", "margin"), ("mean_score", "mean_reward")):
        assert metrics[name] == pytest.approx(trainer._metrics["eval"][told][0])


def test_a_row_is_the_whole_dialogue_and_is_scored_at_its_end() -> None:
    chat = Chat(runs.CONFIGS / "tokenizer")
    example = Example("preference", "", prompt_text="Name a colour.", chosen=" Blue.", rejected=" June.")
    rows = REWARD.encode(example, chat, REWARD.config(name="reward"))
    assert [row.ids for row in rows] == [
        row.ids for row in get("dpo").encode(example, chat, get("dpo").config(name="dpo"))
    ]
    assert all(row.weights == (*(0.0,) * (len(row.ids) - 1), 1.0) for row in rows)
    batch = build(rows, trim=True)
    assert len(batch) < batch.real_tokens  # the prompt once
    assert [int(batch.ids[place]) for place in batch.labels.source] == [row.ids[-1] for row in rows]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reward") / "run"
    settings = {"max_steps": 30, "batch_size": 4, "gradient_accumulation": 1, "eval_every": 15}
    runs.train(output, runs.document("lora", "reward", train=settings, **ASKED), verify=True)
    return output


def test_training_ranks_its_pairs(output: Path) -> None:
    events = [event for event in runs.events(output) if event["event"] == "step"]
    assert events[0]["loss"] == pytest.approx(math.log(2), abs=0.2)
    assert events[-1]["loss"] < 0.1 and events[-1]["accuracy"] == 1
    checks = [event for event in runs.events(output) if event["event"] == "evaluation"]
    assert {"validation_accuracy", "validation_margin", "validation_mean_score"} <= set(checks[0])


def test_a_file_is_scored_row_by_row(output: Path, tmp_path: Path) -> None:
    thing = opened.open(opened.find(str(output)), device="cpu")
    found = evaluate(thing, PAIRS, output=tmp_path / "scores.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    chosen, rejected = (
        [line["scores"]["reward"] for line in lines if line["role"] == r] for r in ("chosen", "rejected")
    )
    assert found["examples"] == len(chosen) == len(PAIRS.read_text().splitlines())
    assert found["accuracy"] == pytest.approx(sum(c > r for c, r in zip(chosen, rejected, strict=True)) / len(chosen))
    assert found["mean_score"] == pytest.approx((sum(chosen) + sum(rejected)) / (2 * len(chosen)), rel=1e-5)
    assert lines[2]["place"].endswith("preference.jsonl:2") and "perplexity" not in found
    with pytest.raises(
        DataError,
        match=r"holds messages.*; a sequence-classification of 1 labels is measured on labelled texts .* or preference",
    ):
        evaluate(thing, runs.CONFIGS / "data" / "messages.jsonl")


def test_what_does_not_score_says_so(output: Path, tmp_path: Path) -> None:
    base = opened.open(opened.find(str(output / "base")), device="cpu")
    assert base.found.base.task is not None  # the random base of a run has a head of its own
    with pytest.raises(
        RecipeError, match=r"model\.task causal-lm does not suit objective reward, which needs sequence-cl"
    ):
        runs.train(tmp_path / "run", runs.document("lora", "reward"))
    with pytest.raises(RecipeError, match=r"model\.task sequence-classification does not suit objective sft"):
        runs.train(tmp_path / "run", runs.document("lora", "sft", **ASKED))


def test_an_adapter_that_answers_cannot_score(tmp_path: Path) -> None:
    runs.train(tmp_path / "run", runs.document(train={"max_steps": 1, "eval_every": None}))
    thing = opened.open(opened.find(str(tmp_path / "run")), device="cpu")
    with pytest.raises(InputError, match="--output: this model predicts tokens and scores no rows"):
        evaluate(thing, PAIRS, output=tmp_path / "scores.jsonl")


def test_generating_with_it_is_refused(output: Path) -> None:
    from peftctl.errors import ModelError
    from peftctl.generation import generate

    thing = opened.open(opened.find(str(output)), device="cpu")
    with pytest.raises(ModelError, match="scores rows and generates no text: measure it with peftctl eval"):
        generate(thing.policy, [1, 2, 3], max_new_tokens=2, end=())


def test_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    settings = runs.document("lora", "reward", train={"save_every": 1}, **ASKED)
    runs.train(tmp_path / "whole", settings)
    with runs.stopped_after(2, tmp_path / "cut"), pytest.raises(BaseException, match="stopped after step 2"):
        runs.train(tmp_path / "cut", settings)
    runs.train(tmp_path / "cut", settings, resume=True)
    assert runs.bits(tmp_path / "cut") == runs.bits(tmp_path / "whole")


def test_goes_on_from_an_adapter_that_learnt_to_answer(tmp_path: Path) -> None:
    runs.train(tmp_path / "sft", runs.document())
    model = {"name": str(tmp_path / "sft" / "base"), "task": "sequence-classification"}
    method = {"init_from": str(tmp_path / "sft"), "rank": 4}
    nothing = {"max_steps": 1, "learning_rate": 1e-12, "eval_every": None}
    runs.train(tmp_path / "run", runs.document("lora", "reward", model=model, method=method, train=nothing))
    ours, theirs = runs.adapter(tmp_path / "run"), runs.adapter(tmp_path / "sft")
    assert set(ours) == {*theirs, "base_model.model.score.weight"}
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)
