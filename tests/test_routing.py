"""The routers' loss: transformers' own on real tokens alone, in every layout, weighed by tokens over micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from peftctl import frozen, methods, objectives
from peftctl.adapter import attach
from peftctl.batch import build
from peftctl.distributed import ALONE
from peftctl.errors import InputError, ModelError, Stopped
from peftctl.opened import policy_of
from peftctl.penalty import balanced
from peftctl.policy import Policy, checkpointed
from peftctl.routing import balance_of, load_balance
from peftctl.row import Row
from peftctl.trainer import Question, _backward, evaluate
from tests import runs
from tests.models import tiny

BASES = ("mixtral", "qwen3_moe")
LAYOUTS = ("shared", "joined", "padded")
COEFFICIENT = 0.5


def row(example: int, length: int, start: int = 0) -> Row:
    """Rows of one `start` share their first 5 tokens."""
    first = torch.randint(3, 100, (5,), generator=torch.Generator().manual_seed(start)).tolist()
    rest = torch.randint(3, 100, (length - 5,), generator=torch.Generator().manual_seed(100 + example)).tolist()
    return Row((*first, *rest), (0.0,) * 5 + (1.0,) * (length - 5), example)


ROWS = [row(0, 9), row(1, 14), row(2, 7, start=1)]


def made(name: str, layout: str = "auto", method: str = "lora", **keys: Any) -> Policy:
    """A policy whose deltas reach the routers, moved off the base."""
    model, chosen = tiny(name), methods.get(method)
    keys = keys or ({"rank": 4, "target_modules": ["o_proj", "experts.down_proj"]} if method == "lora" else {})
    attachment = attach(model, chosen, chosen.config(name=method, **keys), 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in attachment.trainable().values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    policy = policy_of(model, attachment, 2, layout)
    policy.balance = balance_of(model, COEFFICIENT)
    return policy.train()


def slopes(policy: Policy, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = policy.attachment.trainable()
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: own for name, own in zip(named, found, strict=True) if own is not None}


def theirs(policy: Policy, rows: list[Row]) -> torch.Tensor:
    """transformers' loss of a padded rectangle, its padding masked."""
    width = max(len(own.ids) for own in rows)
    mask = torch.tensor([[1] * len(own.ids) + [0] * (width - len(own.ids)) for own in rows])
    ids = torch.tensor([[*own.ids, *(0,) * (width - len(own.ids))] for own in rows])
    output = policy.model(input_ids=ids, attention_mask=mask, output_router_logits=True)
    found = load_balancing_loss_func(output.router_logits, 4, 2, mask if 0 in mask else None)
    torch.testing.assert_close(output.aux_loss, found)  # the model's own loss is this one
    return found


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["one row", "padded by them"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BASES)
def test_it_is_transformers_own_over_real_tokens_with_its_gradients(name: str, layout: str, rows: list[Row]) -> None:
    policy = made(name, layout)
    batch = build(rows)
    policy.tokens(batch)
    (term,) = policy.auxiliary(batch)
    expected = theirs(policy, rows)
    assert term.coefficient == COEFFICIENT and batch.visited == sum(len(own.ids) for own in rows)
    torch.testing.assert_close(term.sum / batch.visited, expected, rtol=1e-5, atol=1e-5)
    right = slopes(policy, expected)
    found = slopes(policy, term.sum / batch.visited)
    assert len(right) >= 2 and found.keys() == right.keys()
    for key, slope in right.items():
        torch.testing.assert_close(found[key], slope, rtol=1e-3, atol=1e-6)


def test_a_trimmed_batch_counts_what_is_computed() -> None:
    policy, batch = made("mixtral", "shared"), build(ROWS, trim=True)
    policy.tokens(batch)
    (term,) = policy.auxiliary(batch)
    short = [Row(own.ids[:-1], own.weights[:-1], own.example) for own in ROWS]  # the last token is a label alone
    assert batch.visited == sum(len(own.ids) for own in short)
    torch.testing.assert_close(term.sum / batch.visited, theirs(policy, short), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_virtual_tokens_do_not_count(layout: str) -> None:
    policy = made("mixtral", layout, "prompt", num_virtual_tokens=3)
    heard = []
    policy.balance.hear = lambda output, counts: heard.append((output.router_logits, counts))
    policy.tokens(build(ROWS))
    ((logits, counts),) = heard
    assert counts.sum() == sum(len(own.ids) for own in ROWS) and len(counts) == len(logits[0])
    assert int((counts == 0).sum()) >= 3


def test_experts_used_alike_give_the_number_that_a_token_goes_to() -> None:
    logits = torch.eye(4)[[0, 1, 2, 3]] * 9 + torch.eye(4)[[1, 2, 3, 0]] * 9
    assert float(load_balance([logits], [torch.ones(4)], 2)) == pytest.approx(2)
    alone = torch.tensor([[9.0, 9.0, 0.0, 0.0]]).expand(4, 4)
    assert float(load_balance([alone], [torch.ones(4)], 2)) == pytest.approx(4, rel=1e-3)  # two of four: twice that


def test_only_passes_with_gradients_are_heard_each_once() -> None:
    policy, batch = made("mixtral"), build(ROWS)
    with torch.no_grad():
        policy.tokens(build(ROWS[2:]))
    policy.tokens(batch)
    (first,) = policy.auxiliary(batch)
    policy.tokens(batch)
    (again,) = policy.auxiliary(batch)
    assert torch.equal(first.sum, again.sum)
    # what an objective asks in two passes is one batch
    for rows in (ROWS[:1], ROWS[1:]):
        policy.tokens(build(rows))
    (both,) = policy.auxiliary(batch)
    torch.testing.assert_close(both.sum, first.sum, rtol=1e-5, atol=1e-5)


def test_recomputing_blocks_changes_neither_it_nor_its_gradients() -> None:
    found = []
    for recompute in (False, True):
        policy, batch = made("mixtral"), build(ROWS)
        if recompute:
            checkpointed(policy.model)
        policy.train().tokens(batch)
        (term,) = policy.auxiliary(batch)
        policy.zero_grad()
        term.sum.backward()
        named = policy.attachment.trainable()
        found.append((float(term.sum.detach()), {n: p.grad.clone() for n, p in named.items() if p.grad is not None}))
    assert found[0][0] == found[1][0] and found[0][1].keys() == found[1][1].keys()
    for name, slope in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], slope, rtol=1e-4, atol=1e-6)


def question(policy: Policy) -> Question:
    objective = objectives.get("sft")
    return Question(balanced(objective, policy), objective.config(name="sft"), policy)


def step(policy: Policy, cut: list[list[Row]]) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """Loss, metrics and gradients of one optimizer step."""
    policy.zero_grad()
    loss, metrics = _backward(question(policy), [build(rows) for rows in cut], 1, torch.device("cpu"), ALONE)
    named = policy.attachment.trainable()
    return loss, metrics, {name: p.grad.clone() for name, p in named.items() if p.grad is not None}


def test_equal_halves_are_one_batch_and_unequal_ones_weigh_as_their_tokens() -> None:
    policy = made("mixtral", "joined")
    again = [Row(own.ids, own.weights, own.example + 10) for own in ROWS]
    whole, halves = step(policy, [ROWS + again]), step(policy, [ROWS, again])
    assert halves[0] == pytest.approx(whole[0], rel=1e-5)
    assert halves[1]["router_loss"] == pytest.approx(whole[1]["router_loss"], rel=1e-5)
    for name, slope in whole[2].items():
        torch.testing.assert_close(halves[2][name], slope, rtol=1e-3, atol=1e-6)
    own = [float(theirs(policy, rows).detach()) for rows in (ROWS[:1], ROWS[1:])]
    parts = step(policy, [ROWS[:1], ROWS[1:]])
    assert parts[1]["router_loss"] == pytest.approx((9 * own[0] + 21 * own[1]) / 30, rel=1e-5)
    assert parts[0] == pytest.approx(parts[1]["loss"] + COEFFICIENT * parts[1]["router_loss"], rel=1e-5)


def test_held_out_rows_have_the_objectives_loss_alone_and_nothing_is_left_behind() -> None:
    policy = made("mixtral")
    found = evaluate(question(policy), [build(ROWS)], "cpu")
    policy.balance = None
    assert balanced(objectives.get("sft"), policy) is objectives.get("sft") and policy.auxiliary(build(ROWS)) == []
    assert found == evaluate(question(policy), [build(ROWS)], "cpu")


def test_every_layer_is_asked_so_frozen_blocks_are_not_passed_over() -> None:
    policy = made("mixtral", "auto", "lora", target_modules=["q_proj"], layers=[1])
    assert frozen.find(policy, ROWS[0]) is None
    policy.balance = None
    assert frozen.find(policy, ROWS[0]) is not None


def test_the_models_config_decides_unless_the_recipe_does() -> None:
    model = tiny("mixtral")
    assert balance_of(model, None) is None
    model.config.output_router_logits = True
    found = balance_of(model, None)
    assert found is not None and (found.coefficient, found.chosen) == (model.config.router_aux_loss_coef, 2)
    assert balance_of(model, 0.0) is None
    with pytest.raises(ModelError, match=r"^train\.router_loss: LlamaForCausalLM does not tell how .*; set it to 0$"):
        balance_of(tiny("llama"), 0.1)


def moe(tmp_path: Path, **keys: Any) -> tuple[Path, dict[str, Any]]:
    model = {"name": str(runs.CONFIGS / "models" / "tiny-mixtral.json")}
    method = {"target_modules": ["o_proj", "experts.down_proj"]}
    return tmp_path / "run", runs.document("lora", "sft", model=model, method=method, train=keys)


def test_a_run_learns_it_logs_it_and_goes_on_with_it_bit_for_bit(tmp_path: Path) -> None:
    output, contents = moe(tmp_path, router_loss=0.1, save_every=1, max_steps=2)
    runs.train(output, contents)
    events = [event for event in runs.events(output) if event["event"] == "step"]
    assert all(event["router_loss"] > 1.9 for event in events)
    again = tmp_path / "again"
    with runs.stopped_after(1, again), pytest.raises(Stopped, match="stopped after step 1"):
        runs.train(again, contents)
    runs.train(again, contents, resume=True)
    assert runs.adapter(again).keys() == runs.adapter(output).keys()
    assert all(torch.equal(tensor, runs.adapter(again)[name]) for name, tensor in runs.adapter(output).items())


def test_a_base_without_experts_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^train\.router_loss: LlamaForCausalLM has no experts to balance; leave it out"
    ):
        runs.train(tmp_path / "run", runs.document("lora", "sft", train={"router_loss": 0.1}))
    assert not (tmp_path / "run").exists()
