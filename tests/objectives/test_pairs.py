"""What every objective on pairs keeps to: pure sums, right gradients, the field's metrics, and no wasted reference."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from peftctl.batch import build
from peftctl.data.chat import Chat
from peftctl.errors import DataError
from peftctl.objectives import get
from peftctl.row import Example, Message
from tests.objectives.paired import PAIRED, REFERENCED, Says, pairs, some, value

every = pytest.mark.parametrize("name", PAIRED)


class Encoder:
    def dialogue(self, messages, trained, tools=()):
        learnt = messages[-1:] if trained == "last" else [m for m in messages if m.weight is None]
        return tuple(len(m.content) for m in messages), tuple(float(m in learnt) for m in messages)

    def completion(self, prompt, answer):
        return (len(prompt), len(answer)), (0.0, 1.0)


def test_the_family_is_whole():
    assert set(PAIRED) >= {"dpo", "ipo", "cpo", "simpo", "orpo"} and set(REFERENCED) == {"dpo", "ipo"}
    for name in PAIRED:
        objective = get(name)
        config = objective.config(name=name)
        assert objective.kinds == {"preference"} and not objective.base_dropout
        assert objective.paper.startswith("https://arxiv.org/abs/")
        assert objective.reference(config) == ("initial" if name in REFERENCED else None)


@every
def test_the_gradient_is_that_of_finite_differences(name):
    batch = pairs(3)
    reference = some(batch, 2, torch.float64)
    assert torch.autograd.gradcheck(
        lambda policy: value(name, policy, reference, batch, sft_weight=0.5),
        some(batch, 1, torch.float64).requires_grad_(),
    )


@every
def test_one_batch_equals_its_parts(name):
    """What the trainer adds up over micro-batches is what it gets from one."""
    objective = get(name)
    config = objective.config(name=name, sft_weight=0.3)
    batch = pairs(5)
    policy, reference = some(batch, 1), some(batch, 2)
    whole = objective.loss(Says(policy), Says(reference), batch, config)
    parts, weights = [], []
    for part in (batch.rows[:4], batch.rows[4:]):
        own = build(part)
        kept = torch.isin(batch.labels.row, torch.tensor([batch.rows.index(row) for row in part]))
        parts.append(objective.loss(Says(policy[kept]), Says(reference[kept]), own, config))
        weights.append(objective.weights(own, config))
    assert [sum(w) for w in zip(*weights, strict=True)] == list(objective.weights(batch, config))
    for term, *others in zip(whole.terms, *(part.terms for part in parts), strict=True):
        assert float(term.sum) == pytest.approx(sum(float(other.sum) for other in others), rel=1e-6)
    for key, (total, count) in whole.metrics.items():
        assert float(total) == pytest.approx(sum(float(part.metrics[key][0]) for part in parts), rel=1e-5), key
        assert float(count) == sum(float(part.metrics[key][1]) for part in parts)


@every
def test_chosen_rises_and_rejected_falls(name):
    batch = pairs(3)
    policy = some(batch, 1).requires_grad_()
    value(name, policy, some(batch, 2), batch, sft_weight=0.0).backward()
    chosen = torch.isin(batch.labels.row, batch.role("chosen"))
    if name == "ipo":  # drawn back from a lead that is large enough, so only together
        assert (policy.grad[chosen].sign() == -policy.grad[chosen][0].sign()).any() or (policy.grad[chosen] < 0).all()
    else:
        assert (policy.grad[chosen] < 0).all() and (policy.grad[~chosen] > 0).all()


@every
def test_the_answers_loss_is_a_term_of_its_own_by_token(name):
    batch, objective = pairs(3), get(name)
    policy, reference = some(batch, 1), some(batch, 2)
    config, plain = (objective.config(name=name, sft_weight=weight) for weight in (0.25, 0.0))
    found = objective.loss(Says(policy), Says(reference), batch, config)
    chosen = torch.isin(batch.labels.row, batch.role("chosen"))
    tokens = float(chosen.sum())
    assert objective.weights(batch, config) == (3.0, tokens) and objective.weights(batch, plain) == (3.0,)
    assert found.terms[1].coefficient == 0.25
    torch.testing.assert_close(found.terms[1].sum, -policy[chosen].sum())
    total, count = found.metrics["nll_loss"]
    assert float(total / count) == pytest.approx(float(-policy[chosen].mean())) and float(count) == tokens
    bare = objective.loss(Says(policy), Says(reference), batch, plain)
    assert len(bare.terms) == 1 and "nll_loss" not in bare.metrics
    torch.testing.assert_close(bare.terms[0].sum, found.terms[0].sum)


@every
def test_the_metrics_have_the_fields_names_and_no_gradient(name):
    batch = pairs(2)
    objective = get(name)
    config = objective.config(name=name)
    policy = some(batch, 1).requires_grad_()
    metrics = objective.loss(Says(policy), Says(some(batch, 2)), batch, config).metrics
    rewards = {f"rewards/{kind}" for kind in ("chosen", "rejected", "margins", "accuracies")}
    assert set(metrics) >= rewards | {"logps/chosen", "logps/rejected", "loss"}
    assert ("kl" in metrics) == (name in REFERENCED)
    assert not any(value.requires_grad for pair in metrics.values() for value in pair)
    sums = torch.zeros(4).index_add(0, batch.labels.row, policy.detach())
    assert float(metrics["logps/chosen"][0]) == pytest.approx(float(sums[0] + sums[2]))
    margin = metrics["rewards/chosen"][0] - metrics["rewards/rejected"][0]
    assert float(metrics["rewards/margins"][0]) == pytest.approx(float(margin), rel=1e-5)


@pytest.mark.parametrize("name", sorted(set(PAIRED) - set(REFERENCED)))
def test_without_a_reference_none_is_asked(name):
    batch = pairs(2)

    class Forbidden:
        def tokens(self, batch):
            raise AssertionError("asked")

    objective = get(name)
    objective.loss(Says(some(batch, 1)), Forbidden(), batch, objective.config(name=name))


@pytest.mark.parametrize("name", REFERENCED)
def test_nothing_flows_into_the_reference(name):
    batch = pairs(2)
    reference = some(batch, 2).requires_grad_()
    value(name, some(batch, 1).requires_grad_(), reference, batch).backward()
    assert reference.grad is None


def test_the_drift_is_zero_at_the_start_and_half_a_square_after():
    batch = pairs(2, 1)
    policy, objective = some(batch, 1), get("dpo")
    config = objective.config(name="dpo")
    for shift, expected in ((0.0, 0.0), (0.5, 0.125), (-2.0, 2.0)):
        total, count = objective.loss(Says(policy + shift), Says(policy), batch, config).metrics["kl"]
        assert float(total / count) == pytest.approx(expected, abs=1e-6)


@every
def test_encodes_a_pair_of_either_form_and_refuses_equal_ones(name):
    objective = get(name)
    config = objective.config(name=name)
    answers = [(Message("assistant", "good"),), (Message("assistant", "bad"),)]
    talk = Example("preference", "", (Message("user", "q"),), chosen=answers[0], rejected=answers[1])
    rows = objective.encode(talk, Encoder(), config)
    assert [(row.ids, row.role) for row in rows] == [((1, 4), "chosen"), ((1, 3), "rejected")]
    same = talk._replace(rejected=(Message("assistant", "same"),))  # another text, the same tokens
    with pytest.raises(DataError, match="chosen and rejected are the same tokens"):
        objective.encode(same, Encoder(), config)


def test_answers_of_several_turns_are_learnt_by_what_the_assistant_says():
    chat = Chat(Path(__file__).parents[2] / "configs" / "tokenizer")
    said = [Message("assistant" if n % 2 else "user", text) for n, text in enumerate("abcdefg", 0)]
    history, chosen = tuple(said[:3]), tuple(said[3:6])  # d, then the user's e, then f
    rejected = (Message("assistant", "no"),)
    pair = Example("preference", "", history, chosen=chosen, rejected=rejected)
    rows = get("dpo").encode(pair, chat, get("dpo").config(name="dpo"))
    end = chat.token(chat.eos_ids[-1])
    learnt = [chat.decode([i for i, w in zip(row.ids, row.weights, strict=True) if w], special=True) for row in rows]
    assert learnt == [f"d{end}f{end}", f"no{end}"]
    start = build(rows).parent.tolist().index(-1)
    assert (
        chat.decode(rows[0].ids[: build(rows).spans[start][1]], special=True).count("c") == 1
    )  # the history is shared
    assert len(build(rows)) < sum(len(row.ids) for row in rows) - len(chat.render_prompt(history)) + 1


# by hand, from the papers: one pair, chosen of 3 tokens at -1 each, rejected of 4 at -1.5 each; reference -1.2, -1.4
CHOSEN, REJECTED, AGAINST = (-1.0, 3), (-1.5, 4), (-1.2, -1.4)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


LEAD = (3 * -1.0 - 3 * -1.2) - (4 * -1.5 - 4 * -1.4)  # of sums: 0.6 + 0.4
MEAN = (-1.0 + 1.2) - (-1.5 + 1.4)
ODDS = math.log(math.exp(-1.0) / (1 - math.exp(-1.0))) - math.log(math.exp(-1.5) / (1 - math.exp(-1.5)))


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("dpo", {"beta": 0.5}, -math.log(sigmoid(0.5 * LEAD))),
        ("dpo", {"beta": 0.5, "length_normalised": True}, -math.log(sigmoid(0.5 * MEAN))),
        ("dpo", {"beta": 0.5, "loss": "hinge"}, 1 - 0.5 * LEAD),
        ("dpo", {"beta": 2.0, "loss": "hinge"}, 0.0),
        (
            "dpo",
            {"beta": 0.5, "loss": "robust", "label_smoothing": 0.1},
            (-0.9 * math.log(sigmoid(0.5 * LEAD)) + 0.1 * math.log(sigmoid(-0.5 * LEAD))) / 0.8,
        ),
        ("ipo", {"beta": 0.25}, (MEAN - 2) ** 2),
        ("ipo", {"beta": 0.25, "length_normalised": False}, (LEAD - 2) ** 2),
        ("cpo", {"beta": 0.5}, -math.log(sigmoid(0.5 * (-3 + 6))) + 1.0),
        ("cpo", {"beta": 0.5, "sft_weight": 0.0}, -math.log(sigmoid(0.5 * (-3 + 6)))),
        ("simpo", {"beta": 2.0, "gamma": 0.7}, -math.log(sigmoid(2 * (-1 + 1.5) - 0.7))),
        ("orpo", {"beta": 0.3}, 1.0 - 0.3 * math.log(sigmoid(ODDS))),
    ],
)
def test_equals_the_papers_formula(name, settings, expected):
    batch = pairs(1)
    policy, reference = (
        torch.cat([torch.full((n,), x, dtype=torch.float64) for x, n in ((c, 3), (r, 4))])
        for c, r in ((CHOSEN[0], REJECTED[0]), AGAINST)
    )
    assert float(value(name, policy, reference, batch, **settings)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_certain_tokens_have_finite_odds():
    batch = pairs(2)
    policy = torch.zeros(len(batch.labels.target), requires_grad=True)
    loss = value("orpo", policy, policy.detach(), batch)
    loss.backward()
    assert loss.isfinite() and policy.grad.isfinite().all()


@pytest.mark.parametrize(
    "settings",
    [{"loss": "hinge", "label_smoothing": 0.1}, {"loss": "ipo"}, {"sft_weight": -1.0}, {"sft_weight": float("nan")}],
)
def test_refuses_nonsense(settings):
    with pytest.raises(ValueError):
        get("dpo").config(name="dpo", **settings)
