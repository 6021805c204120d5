"""KTO is the paper's formula, its reference point that of the whole step, its mismatched answers another's."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftctl.batch import build
from peftctl.errors import DataError
from peftctl.objectives import get
from peftctl.objectives.base import TokenStats
from peftctl.row import Example, Message, Row
from tests.objectives.test_pairs import Encoder, sigmoid

KTO = get("kto")
CONFIG = KTO.config(name="kto")


class Table:
    """A policy that gives each token its own log-probability, whatever comes before it."""

    def __init__(self, seed: int, dtype=torch.float64) -> None:
        self.of = -3 * torch.rand(40, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        self.seen: list[tuple[str, ...]] = []

    def tokens(self, batch) -> TokenStats:
        self.seen.append(batch.roles)
        logprob = self.of[batch.labels.target]
        return TokenStats(logprob, torch.ones_like(logprob))


def examples(n: int) -> list[tuple[Row, ...]]:
    """Prompts and answers of uneven length, every third answer undesirable."""
    found = []
    for i in range(n):
        prompt, answer = (1, *range(2, 3 + i % 4)), tuple(10 + (3 * i + k) % 30 for k in range(1 + i % 5))
        weights = (0.0,) * len(prompt) + (1.0,) * len(answer)
        role = "undesirable" if i % 3 == 2 else "desirable"
        found.append((Row(prompt + answer, weights, i, role),))
    return found


def paired(n: int) -> list[tuple[Row, ...]]:
    return list(KTO.pair(examples(n), list(range(n))))


def batches(n: int, size: int):
    rows = paired(n)
    return [build([row for own in rows[k : k + size] for row in own]) for k in range(0, n, size)]


def value(policy, reference, parts, config=CONFIG):
    shared = KTO.shared(policy, reference, parts, config)
    losses = [KTO.loss(policy, reference, part, config, shared) for part in parts]
    weights = [sum(w) for w in zip(*(KTO.weights(part, config) for part in parts), strict=True)]
    terms = zip(*(found.terms for found in losses), strict=True)
    return sum(own[0].coefficient * sum(t.sum for t in own) / w for own, w in zip(terms, weights, strict=True))


def by_hand(policy, reference, rows, config) -> float:
    """Equations 7 and 8 of the paper, in plain Python numbers; of each example its own row and the mismatched one."""

    def gain(row: Row) -> float:
        labelled = [token for token, weight in zip(row.ids, row.weights, strict=True) if weight]
        return sum(float(policy.of[t] - reference.of[t]) for t in labelled)

    kl = max(0.0, sum(gain(other) for _, other in rows) / len(rows))
    total = 0.0
    for own, _ in rows:
        if own.role == "desirable":
            total += config.desirable_weight * (1 - sigmoid(config.beta * (gain(own) - kl)))
        else:
            total += config.undesirable_weight * (1 - sigmoid(config.beta * (kl - gain(own))))
    return total / len(rows)


@pytest.mark.parametrize("settings", [{}, {"beta": 0.7}, {"desirable_weight": 1.3, "undesirable_weight": 0.4}])
@pytest.mark.parametrize("seed", [1, 2])
def test_equals_the_papers_formula(settings, seed):
    config = KTO.config(name="kto", **settings)
    for policy, reference in ((Table(seed), Table(seed + 2)), (Table(seed + 2), Table(seed))):  # kl above 0, and not
        expected = by_hand(policy, reference, paired(7), config)
        assert float(value(policy, reference, batches(7, 7), config)) == pytest.approx(expected, rel=1e-9)


@given(st.integers(2, 12), st.integers(1, 12), st.sampled_from([0.0, 0.4]))
def test_however_a_step_is_cut_it_is_the_same(n, size, sft):
    config = KTO.config(name="kto", sft_weight=sft)
    policy, reference = Table(1), Table(4)
    policy.of.requires_grad_()
    whole, parts = (value(policy, reference, batches(n, k), config) for k in (n, size))
    assert float(whole.detach()) == pytest.approx(float(parts.detach()), rel=1e-9)
    torch.testing.assert_close(*(torch.autograd.grad(x, policy.of)[0] for x in (whole, parts)))


def test_starts_at_a_half_to_the_last_bit():
    policy, parts = Table(1, torch.float32), batches(6, 2)
    assert float(KTO.shared(policy, policy, parts, CONFIG)["kl"]) == 0.0
    assert float(value(policy, policy, parts)) == 0.5


def test_the_gradient_is_that_of_finite_differences_with_the_point_held_fixed():
    policy, reference, parts = Table(3), Table(1), batches(6, 6)
    shared = KTO.shared(policy, reference, parts, CONFIG)
    assert float(shared["kl"]) > 0 and not shared["kl"].requires_grad

    def loss(of):
        policy.of = of
        return KTO.loss(policy, reference, parts[0], CONFIG, shared).terms[0].sum

    assert torch.autograd.gradcheck(loss, policy.of.clone().requires_grad_())


def test_mismatched_answers_are_asked_about_once_and_without_their_own():
    policy, reference = Table(1), Table(3)
    value(policy, reference, batches(4, 2))
    assert policy.seen == reference.seen
    assert [set(roles) for roles in policy.seen[:2]] == [{"mismatched"}] * 2
    assert not any("mismatched" in roles for roles in policy.seen[2:]) and len(policy.seen) == 4


@given(st.integers(2, 15), st.randoms(use_true_random=False))
def test_each_answer_is_given_to_one_other_prompt(n, random):
    order = random.sample(range(n), n)
    own = examples(n)
    found = KTO.pair(own, order)
    assert [rows[:1] for rows in found] == own and KTO.pair(own, order) == found
    longest = max(len(rows[0].ids) for rows in own)
    giver = {receiver: before for before, receiver in pairwise((*order, order[0]))}
    for index, (row, other) in enumerate(found):
        start, theirs = row.weights.index(1.0), own[giver[index]][0]
        answer = theirs.ids[theirs.weights.index(1.0) :]
        assert giver[index] != index and other.role == "mismatched" and other.example == row.example
        assert other.ids == (*row.ids[:start], *answer)[:longest] and len(other.ids) > start
        assert other.weights == (0.0,) * start + (1.0,) * (len(other.ids) - start)
    with pytest.raises(DataError, match="one row alone is not enough"):
        KTO.pair(own[:1], [0])


def test_metrics_by_hand():
    policy, reference, parts = Table(1), Table(3), batches(6, 6)
    shared = KTO.shared(policy, reference, parts, CONFIG)
    metrics = KTO.loss(policy, reference, parts[0], CONFIG, shared).metrics
    found = {name: float(total / count) for name, (total, count) in metrics.items()}
    gain = [
        sum(float(policy.of[t] - reference.of[t]) for t in row.ids[row.weights.index(1.0) :]) for row, _ in paired(6)
    ]
    good, bad = [gain[i] for i in (0, 1, 3, 4)], [gain[i] for i in (2, 5)]
    kl = float(shared["kl"])
    assert found["rewards/chosen"] == pytest.approx(0.1 * sum(good) / 4)
    assert found["rewards/rejected"] == pytest.approx(0.1 * sum(bad) / 2)
    assert found["kl"] == pytest.approx(kl)
    assert found["rewards/accuracies"] == pytest.approx((sum(g > kl for g in good) + sum(b < kl for b in bad)) / 6)
    assert {"loss", "logps/chosen", "logps/rejected"} < set(found)
    assert not any(x.requires_grad for pair in metrics.values() for x in pair)


@pytest.mark.parametrize("role", ["desirable", "undesirable"])
def test_a_batch_may_lack_either_kind(role):
    rows = [row for own in paired(6) for row in own if row.role in (role, "mismatched")]
    parts = [build(rows)]
    for sft in (0.0, 0.5):
        config = KTO.config(name="kto", sft_weight=sft)
        shared = KTO.shared(Table(1), Table(3), parts, config)
        found = KTO.loss(Table(1), Table(3), parts[0], config, shared)
        assert all(math.isfinite(float(term.sum)) for term in found.terms)
        empty = "rejected" if role == "desirable" else "chosen"
        assert float(found.metrics[f"rewards/{empty}"][1]) == 0


def test_encodes_judged_answers_of_either_form():
    talk = Example("unpaired", "", (Message("user", "q"), Message("assistant", "good")), label=True)
    plain = Example("unpaired", "", prompt_text="q", completion="bad", label=False)
    assert KTO.encode(talk, Encoder(), CONFIG) == (Row((1, 4), (0.0, 1.0), role="desirable"),)
    assert KTO.encode(plain, Encoder(), CONFIG) == (Row((1, 3), (0.0, 1.0), role="undesirable"),)
