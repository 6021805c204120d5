"""Papers in miniature, on the real SmolLM2 and real dialogues.

DPO: rewards rise, and beta holds the policy back. GRPO: what is rewarded comes to be answered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from peftctl import opened, recipe
from peftctl.batch import build
from peftctl.data.dataset import load
from peftctl.objectives import get
from peftctl.plan import Options
from peftctl.policy import Policy
from peftctl.report import read
from peftctl.row import Row
from peftctl.run import train
from tests.demo import fetch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DIALOGUES = ROOT / ".cache" / "peftctl" / "dialogues"
RECIPE = ROOT / "recipes" / "smollm2-dpo.yaml"
PADDING = " I hope that this answers your question. Please let me know if there is anything else I can help you with."


def talks(name: str) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in (DIALOGUES / f"{name}.jsonl").read_text("utf-8").splitlines()]


def wrong(name: str) -> list[dict[str, Any]]:
    """The right answer against another question's."""
    return fetch.pairs(talks(name))


def padded(name: str) -> list[dict[str, Any]]:
    """The right answer against the same with two empty sentences behind it."""
    asked = [(talk[0]["content"], talk[1]["content"]) for talk in talks(name)]
    return [fetch.as_messages({"prompt": q, "chosen": a, "rejected": a + PADDING}) for q, a in asked]


def run(folder: Path, pairs: Any, *settings: str) -> tuple[Path, list[dict[str, Any]]]:
    """40 steps of 4 pairs; the run's folder and its evaluations on held-out dialogues, the start's first."""
    folder.mkdir(exist_ok=True)
    for name in ("train", "heldout"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(name)), "utf-8")
    files = [f"data.train={folder}/train.jsonl", f"data.validation={folder}/heldout.jsonl", f"output={folder}/run"]
    result = train(
        recipe.load(RECIPE, [*files, "train.eval_every=20", "train.learning_rate=1e-4", *settings]), Options(quiet=True)
    )
    events = read(Path(result["run"]) / "metrics.jsonl")
    return Path(result["run"]), [event for event in events if event["event"] == "evaluation"]


def policy_of(folder: Path) -> opened.Opened:
    return opened.open(opened.find(str(folder)), device="cpu", dtype="float32")


@torch.no_grad()
def divergence(policy: Policy, rows: list[Row]) -> float:
    """KL(policy || base) over the whole vocabulary, a mean over the answers' tokens."""
    batch = build(rows)
    spoken = []
    for switch in (False, True):
        if switch:
            with policy.attachment.disabled():
                hidden, places = policy.hidden(batch)
                spoken.append(policy.head(hidden[places]).log_softmax(-1))  # type: ignore[misc]
        else:
            hidden, places = policy.hidden(batch)
            spoken.append(policy.head(hidden[places]).log_softmax(-1))  # type: ignore[misc]
    return float((spoken[0].exp() * (spoken[0] - spoken[1])).sum(-1).mean())


def test_margins_rise_on_unseen_pairs_and_a_larger_beta_keeps_nearer_to_the_reference(tmp_path: Path) -> None:
    drifts, kept = [], None
    for beta in (0.05, 0.2, 0.8):
        folder, (middle, last) = run(tmp_path / f"beta-{beta}", wrong, f"objective.beta={beta}")
        start = read(folder / "metrics.jsonl")[0]
        assert start["rewards/margins"] == 0 and start["rewards/accuracies"] == 0
        assert 0 < middle["validation_rewards/margins"] < last["validation_rewards/margins"]
        assert last["validation_rewards/accuracies"] > max(0.75, middle["validation_rewards/accuracies"] - 0.05)
        ended = policy_of(folder)
        kept = kept or load(folder.parent / "heldout.jsonl", ended.chat, get("dpo"), get("dpo").config(name="dpo"))[0]
        rows = [rows[0] for rows in kept.examples]
        drifts.append(divergence(ended.policy, rows))
    assert drifts[0] > drifts[1] > drifts[2] > 0


def test_terse_answers_come_to_be_preferred_to_padded_ones(tmp_path: Path) -> None:
    _, (_, last) = run(tmp_path / "terse", padded)
    assert last["validation_rewards/accuracies"] >= 0.95
    assert last["validation_rewards/margins"] > 1


def test_what_is_rewarded_comes_to_be_answered(tmp_path: Path) -> None:
    """The recipe as it is: one short sentence. Before, at a rate that moves nothing, held-out answers earn a third."""
    rewards = []
    for name, settings in (("start", ["train.max_steps=1", "train.learning_rate=1e-9"]), ("end", [])):
        wanted = recipe.load(RECIPE.with_name("smollm2-grpo.yaml"), [*settings, f"output={tmp_path / name}"])
        train(wanted, Options(quiet=True))
        events = read(tmp_path / name / "metrics.jsonl")
        rewards.append([event["validation_reward"] for event in events if event["event"] == "evaluation"][-1])
        assert all(event["clip_fraction"] == 0 for event in events if event["event"] == "step")
    assert rewards[0] < 0.5 and rewards[1] > 2 * rewards[0], rewards
