"""The benchmark of pairs: what both sides are given, what counts, and that a technique taken out changes no answer."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from peftctl import fuse, policy
from peftctl.kernels import forest, rectangles, token_stats
from peftctl.objectives import get
from peftctl.policy import Reference
from tests.benchmarks.peer import VARIANTS, _pairs
from tests.benchmarks.sides import peers
from tests.benchmarks.speed import _groups
from tests.benchmarks.without import TECHNIQUES
from tests.benchmarks.workloads import PREFERENCE, WORKLOADS
from tests.objectives.paired import pairs
from tests.test_fuse import policy as made


def test_the_peer_gets_each_pair_once_and_both_epochs_in_our_order() -> None:
    rows = list(pairs(3).rows)
    epochs = [rows[2:4], rows[4:6], rows[:2], rows[:2], rows[2:4], rows[4:6]]
    order, columns = _pairs([row for pair in epochs for row in pair])
    assert order == [0, 1, 2, 2, 0, 1]
    assert columns["prompt_ids"] == [[1, 3], [1, 4], [1, 2]]
    seen = [tuple(columns[f"{row.role}_ids"][place]) for place, pair in zip(order, epochs, strict=True) for row in pair]
    assert seen == [row.ids[2:] for pair in epochs for row in pair]


def test_of_two_epochs_the_second_counts() -> None:
    assert WORKLOADS["dpo"].warm(12) == slice(2, 12)
    assert [WORKLOADS["dpo-second"].warm(n) for n in (12, 13)] == [slice(6, 12)] * 2


def test_the_peer_may_ask_its_reference_first_where_it_is_asked_twice() -> None:
    for name, workload in WORKLOADS.items():
        ways = peers(workload, "cpu")
        assert set(ways) <= set(VARIANTS)
        assert any(VARIANTS[way].get("precompute_ref_log_probs") for way in ways) == name.startswith("dpo-second")


def test_what_is_measured_beside_one_run_of_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.benchmarks.speed.fits", lambda workload: True)
    named = [[workload.name for workload in group] for group in _groups(["short", "dpo"], False)]
    assert named == [["short"], ["dpo"]]
    assert [[w.name for w in group] for group in _groups(["short"], True)] == [list(group) for group in PREFERENCE]
    assert [[w.name for w in group] for group in _groups(["dpo"], True)] == [list(PREFERENCE[0])]


@pytest.fixture
def put_back() -> Iterator[None]:
    """Techniques are taken out of the modules themselves."""
    places: list[ModuleType | type] = [policy, policy.Policy, fuse, forest, rectangles, token_stats]
    before = [dict(vars(place)) for place in places]
    yield
    for place, names in zip(places, before, strict=True):
        for name, value in names.items():
            if vars(place)[name] is not value:
                setattr(place, name, value)


def answered() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one micro-batch of pairs."""
    found = made("llama")
    found.fuse(pack=False)
    objective, batch = get("dpo"), pairs(3)
    loss = objective.loss(found, Reference(found, None), batch, objective.config(name="dpo"))
    loss.terms[0].sum.backward()
    trained = found.attachment.trainable().items()
    return loss.terms[0].sum.detach(), {name: p.grad for name, p in trained if p.grad is not None}


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_what_is_taken_out_changes_no_answer(technique: str, put_back: None) -> None:
    loss, grads = answered()
    TECHNIQUES[technique]()
    other, others = answered()
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=0)
    assert grads.keys() == others.keys() and grads
    for name, grad in grads.items():
        torch.testing.assert_close(others[name], grad, rtol=1e-4, atol=1e-6)
