"""Runs on preferences: what is logged of held-out rows, shared starts, the distance from the reference at the start."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftctl import methods
from peftctl.adapter import attach
from peftctl.kernels import token_stats
from peftctl.objectives import get
from peftctl.opened import policy_of
from peftctl.policy import Reference
from tests import runs
from tests.models import VOCABULARY, tiny
from tests.objectives.paired import PAIRED, pairs

ONE = {"max_steps": 1, "gradient_accumulation": 1, "eval_every": 1}
# what is measured of the optimizer, not of the rows
STEPS_OWN = {"event", "step", "lr", "grad_norm", "tokens", "tokens_per_s", "seconds", "start_distance"}


@pytest.mark.parametrize("objective", [*PAIRED, "kto", "grpo"])
def test_held_out_rows_are_measured_as_each_step_is(objective: str, tmp_path: Path) -> None:
    runs.train(tmp_path / "run", runs.document("lora", objective, train=ONE))
    step, evaluation = runs.events(tmp_path / "run")
    measured = {name for name in step if name not in STEPS_OWN}
    assert {f"validation_{name}" for name in measured} <= set(evaluation)
    rewards = {"reward"} if objective == "grpo" else {"rewards/chosen", "rewards/rejected", "rewards/accuracies"}
    assert rewards | {"loss"} <= measured
    assert all(math.isfinite(value) for value in evaluation.values() if isinstance(value, float))


def pairs_of_several_turns(folder: Path) -> str:
    """Pairs with a history of three turns, of which two have the same."""
    rows = []
    for number in range(9):
        said = [f"question {number // 2}", "an answer", "and then?"]
        talk = [{"role": "assistant" if k % 2 else "user", "content": text} for k, text in enumerate(said)]
        chosen, rejected = ([*talk, {"role": "assistant", "content": text}] for text in (f"this {number}", "that"))
        rows.append({"chosen": chosen, "rejected": rejected})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_shared_starts_change_no_loss_and_no_gradient(objective: str, tmp_path: Path) -> None:
    data = pairs_of_several_turns(tmp_path)
    for share in (True, False):
        # a reference that is remembered was computed in other batches, which may round otherwise: ties would break
        train = {"optimizer": "sgd", "max_grad_norm": None, "cache_reference": False}
        contents = runs.document("lora", objective, data={"train": data, "share_starts": share}, train=train)
        runs.train(tmp_path / str(share), contents)
    for ours, theirs in zip(runs.events(tmp_path / "True"), runs.events(tmp_path / "False"), strict=True):
        names = [name for name in ours if isinstance(ours[name], float) and name not in runs.TIMINGS]
        assert [ours[n] for n in names] == pytest.approx([theirs[n] for n in names], rel=1e-5, abs=1e-6)


def begun(output: Path) -> float | None:
    """What was said of the first step; of others it must not be."""
    first, *rest = (event for event in runs.events(output) if event["event"] == "step")
    assert not any("start_distance" in event for event in rest)
    return first.get("start_distance")


def test_how_far_from_its_reference_a_run_begins_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def trained(name: str, **blocks: dict[str, Any]) -> str:
        recipe = runs.loaded(tmp_path / name, runs.document("lora", "dpo", **blocks))
        runs.run.train(recipe, runs.Options(verify=False))
        return capsys.readouterr().err

    # equal to the last bit where the reference is asked about the same batch, not where it is remembered from another
    same = {"max_steps": 2, "cache_reference": False}
    assert "the first loss is" not in trained("plain", train=same) and begun(tmp_path / "plain") == 0.0
    more = {"model": {"name": str(tmp_path / "plain" / "base")}, "train": {"max_steps": 1}}
    told = trained("other", objective={"reference": str(tmp_path / "plain")}, **more)
    distance, loss = begun(tmp_path / "other"), runs.events(tmp_path / "other")[0]["loss"]
    assert distance == pytest.approx(loss - math.log(2), abs=1e-7) and distance != 0
    assert f"the first loss is {distance:+.3g} from 0.693147, that of equal answers" in told
    trained("hinge", objective={"loss": "hinge"}, train={"max_steps": 1})
    assert begun(tmp_path / "hinge") == 0.0
    trained("more", objective={"sft_weight": 1.0}, train={"max_steps": 1})
    assert begun(tmp_path / "more") is None


class Largest(TorchDispatchMode):
    """The most rows that a tensor as wide as the vocabulary has."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(result.alias_info for result in func._schema.returns):
            return out  # no tensor of its own
        wide = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.shape[-1:] == (VOCABULARY,)]
        self.rows = max([self.rows, *(t.numel() // VOCABULARY for t in wide if t.is_floating_point())])
        return out


@pytest.mark.parametrize("trained_head", [False, True])
def test_no_tensor_is_as_large_as_all_labels_by_the_vocabulary(
    trained_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_stats, "CHUNK", 4 * 7 * VOCABULARY)  # bytes
    model, method = tiny("llama"), methods.get("lora")
    modules = ["q_proj", *(["lm_head"] if trained_head else [])]
    attachment = attach(model, method, method.config(name="lora", rank=2, target_modules=modules), 0)
    policy, objective, batch = policy_of(model, attachment, 2).train(), get("dpo"), pairs(4)
    assert len(batch.labels.target) > 20
    with Largest() as largest:
        loss = objective.loss(policy, Reference(policy, None), batch, objective.config(name="dpo"))
        loss.terms[0].sum.backward()
    assert 1 < largest.rows <= 7
