"""DPO is the paper's formula; it starts at ln 2 to the last bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from peftctl.batch import build
from peftctl.objectives import get
from peftctl.row import Example, Message, Row
from tests.objectives.paired import Says, pairs, some

DPO = get("dpo")
CONFIG = DPO.config(name="dpo")


def by_hand(policy, reference, batch, beta: float, smoothing: float = 0.0) -> float:
    """Equation 7 of the paper, in plain Python numbers."""
    sums = [[0.0, 0.0] for _ in batch.rows]
    columns = (t.tolist() for t in (batch.labels.row, batch.labels.weight, policy, reference))
    for row, weight, p, r in zip(*columns, strict=True):
        sums[row][0] += weight * p
        sums[row][1] += weight * r
    total = 0.0
    for chosen, rejected in zip(sums[::2], sums[1::2], strict=True):
        margin = beta * ((chosen[0] - chosen[1]) - (rejected[0] - rejected[1]))
        wins = 1 / (1 + math.exp(-margin))
        total += -(1 - smoothing) * math.log(wins) - smoothing * math.log(1 - wins)
    return total


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equals_the_papers_formula(beta, smoothing):
    batch = pairs(4)
    config = DPO.config(name="dpo", beta=beta, label_smoothing=smoothing)
    policy, reference = some(batch, 1), some(batch, 2)
    loss = DPO.loss(Says(policy), Says(reference), batch, config)
    assert float(loss.terms[0].sum) == pytest.approx(by_hand(policy, reference, batch, beta, smoothing), rel=1e-5)
    assert DPO.weights(batch, config) == (4.0,)


@given(st.integers(1, 40), st.integers(0, 9), st.sampled_from([0.0, 0.1, 0.3]))
def test_starts_at_ln_2_to_the_last_bit(n, seed, smoothing):
    batch = pairs(n, 7)
    same = some(batch, seed)
    config = DPO.config(name="dpo", beta=0.37, label_smoothing=smoothing)
    loss = DPO.loss(Says(same.clone().requires_grad_()), Says(same), batch, config)
    ln2 = torch.tensor(math.log(2), dtype=torch.float32)
    assert torch.equal((loss.terms[0].sum / n).float(), ln2)
    total, count = loss.metrics["loss"]
    assert torch.equal((total / count).float(), ln2)
    for name in ("chosen", "rejected", "margins", "accuracies"):
        assert float(loss.metrics[f"rewards/{name}"][0]) == 0.0


def test_the_gradient_is_that_of_finite_differences():
    batch = pairs(2)
    reference = some(batch, 2, torch.float64)
    config = DPO.config(name="dpo", beta=0.5, label_smoothing=0.1)
    assert torch.autograd.gradcheck(
        lambda policy: DPO.loss(Says(policy), Says(reference), batch, config).terms[0].sum,
        some(batch, 1, torch.float64).requires_grad_(),
    )


def test_nothing_flows_into_the_reference():
    batch = pairs(2)
    policy, reference = some(batch, 1).requires_grad_(), some(batch, 2).requires_grad_()
    DPO.loss(Says(policy), Says(reference), batch, CONFIG).terms[0].sum.backward()
    # the chosen answers' tokens rise (a negative gradient), the rejected ones' fall
    chosen = torch.isin(batch.labels.row, batch.role("chosen"))
    assert (policy.grad[chosen] < 0).all() and (policy.grad[~chosen] > 0).all()
    assert policy.grad.dtype == torch.float32


def test_metrics_by_hand():
    batch = pairs(2, 1, growth=0)  # labels: chosen 1, rejected 2, chosen 1, rejected 2
    policy = torch.tensor([-1.0, -2.0, -2.0, -3.0, -1.0, -1.0])
    reference = torch.tensor([-2.0, -2.0, -1.0, -1.0, -1.0, -1.0])
    metrics = DPO.loss(Says(policy), Says(reference), batch, DPO.config(name="dpo", beta=0.5)).metrics
    found = {name: float(total / count) for name, (total, count) in metrics.items() if name != "loss"}
    assert found == {
        "rewards/chosen": pytest.approx(0.5 * (1.0 - 2.0) / 2),
        "rewards/rejected": pytest.approx(0.5 * (-1.0 + 0.0) / 2),
        "rewards/margins": pytest.approx(0.5 * (2.0 - 2.0) / 2),
        "rewards/accuracies": 0.5,
        "logps/chosen": pytest.approx(-2.0),
        "logps/rejected": pytest.approx(-3.0),
        "kl": pytest.approx((1 + 0 + 1 + 4) / 12),
    }


def test_pairs_need_not_be_neighbours():
    rows = list(pairs(3).rows)
    moved = build([*rows[::2], *rows[1::2]])
    straight, policy = build(rows), some(pairs(3), 1)
    order = torch.cat([torch.where(straight.labels.row == i)[0] for i in (0, 2, 4, 1, 3, 5)])
    losses = [
        DPO.loss(Says(p), Says(torch.zeros_like(p)), batch, CONFIG).terms[0].sum
        for p, batch in ((policy, straight), (policy[order], moved))
    ]
    torch.testing.assert_close(*losses)


def test_encodes_a_pair_of_either_form():
    class Encoder:
        def dialogue(self, messages, trained, tools=()):
            return tuple(len(m.content) for m in messages), (
                0.0,
                float(trained == "assistant" and not messages[0].weight),
            )

        def completion(self, prompt, answer):
            return (len(prompt), len(answer)), (0.0, 1.0)

    answers = [(Message("assistant", "good"),), (Message("assistant", "bad"),)]
    talk = Example("preference", "", (Message("user", "q"),), chosen=answers[0], rejected=answers[1])
    plain = Example("preference", "", prompt_text="q", chosen="good", rejected="bad")
    expected = (Row((1, 4), (0.0, 1.0), role="chosen"), Row((1, 3), (0.0, 1.0), role="rejected"))
    assert DPO.encode(talk, Encoder(), CONFIG) == DPO.encode(plain, Encoder(), CONFIG) == expected


def test_says_what_it_needs_and_refuses_nonsense():
    assert DPO.reference(CONFIG) == "initial" and not DPO.base_dropout and DPO.kinds == {"preference"}
    assert DPO.reference(DPO.config(name="dpo", reference="base")) == "base"
    for wrong in ({"beta": 0}, {"beta": float("inf")}, {"label_smoothing": 0.5}, {"label_smoothing": float("nan")}):
        with pytest.raises(ValidationError):
            DPO.config(name="dpo", **wrong)
