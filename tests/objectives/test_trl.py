"""Losses and gradients are those of TRL on the same log-probabilities."""

from __future__ import annotations

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from peftctl.objectives import get
from tests.objectives import test_kto as judged
from tests.objectives.paired import Says, pairs, some

N = 5


@pytest.fixture(scope="module")
def trl() -> SimpleNamespace:
    """Its trainers, which take long to import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import DPOTrainer, KTOTrainer
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer
    return SimpleNamespace(dpo=DPOTrainer, kto=KTOTrainer, cpo=CPOTrainer, orpo=ORPOTrainer)


def bare(trainer: type, **attributes: Any) -> Any:
    """A trainer without model or data: what its loss functions read is set by hand."""
    made = object.__new__(trainer)
    same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    for name, value in {"accelerator": same, "aux_loss_enabled": False, **attributes}.items():
        setattr(made, name, value)
    return made


class Table:
    """Labels in a rectangle as TRL has them: (rows, longest), rejected rows after the chosen ones."""

    def __init__(self, batch: Any) -> None:
        order = [*batch.role("chosen").tolist(), *batch.role("rejected").tolist()]
        self.rows = torch.tensor([order.index(int(r)) for r in batch.labels.row])
        starts: dict[int, int] = {}
        self.columns = torch.tensor([starts.setdefault(int(r), i) * -1 + i for i, r in enumerate(batch.labels.row)])
        self.shape = (len(order), int(self.columns.max()) + 1)

    def __call__(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.shape).index_put((self.rows, self.columns), values)


def sums(batch: Any, values: Tensor, mean: bool = False) -> tuple[Tensor, Tensor]:
    table = Table(batch)
    found = table(values).sum(1)
    return (found / table(torch.ones_like(values)).sum(1) if mean else found).chunk(2)


def theirs_of_dpo(trl: Any, kind: str, beta: float, smoothing: float, sft: float, batch: Any, *logprobs: Tensor) -> Any:
    """DPOTrainer's own loss and metrics; the model's answers are put in its mouth."""
    table = Table(batch)
    policy, reference = map(table, logprobs)
    mask = torch.cat([torch.zeros(len(policy), 1), table(torch.ones_like(logprobs[0]))], dim=1)
    flat = torch.zeros_like(policy)
    spoken = SimpleNamespace(log_probs=policy, entropy=flat, mean_logits=flat, is_top1=flat.bool())
    model = lambda **inputs: spoken  # noqa: E731
    ref_chosen, ref_rejected = reference.sum(1).chunk(2)
    inputs = {"input_ids": mask.long(), "attention_mask": mask.long(), "completion_mask": mask.long()}
    inputs |= {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
    trainer = bare(
        trl.dpo,
        model=SimpleNamespace(training=False),
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind, "sft"],
        loss_weights=[1.0, sft],
        label_smoothing=smoothing,
        beta=beta,
        use_weighting=False,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    return trainer._compute_loss(model, inputs, False), trainer._metrics["eval"]


def ours(name: str, settings: dict[str, Any], batch: Any, policy: Tensor, reference: Tensor) -> Any:
    objective = get(name)
    config = objective.config(name=name, **settings)
    found = objective.loss(Says(policy), Says(reference), batch, config)
    weights = objective.weights(batch, config)
    total = sum(t.coefficient * t.sum / w for t, w in zip(found.terms, weights, strict=True))
    return total, {key: float(s / n) for key, (s, n) in found.metrics.items()}


def the_same(a: Tensor, b: Tensor, policy: Tensor) -> None:
    torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-9, atol=1e-12)
    one, other = (torch.autograd.grad(loss, policy, retain_graph=True)[0] for loss in (a, b))
    assert float(one.abs().sum()) > 0
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("sft", [0.0, 0.7])
@pytest.mark.parametrize(
    ("theirs", "name", "settings", "smoothing"),
    [
        ("sigmoid", "dpo", {}, 0.0),
        ("sigmoid_norm", "dpo", {"length_normalised": True}, 0.0),
        ("hinge", "dpo", {"loss": "hinge"}, 0.0),
        ("robust", "dpo", {"loss": "robust"}, 0.2),
        ("ipo", "ipo", {}, 0.0),
    ],
)
def test_with_a_reference(theirs, name, settings, smoothing, sft, trl):
    batch = pairs(N)
    policy, reference = (some(batch, seed, torch.float64) for seed in (1, 2))
    policy.requires_grad_()
    their_loss, their_metrics = theirs_of_dpo(trl, theirs, 0.3, smoothing, sft, batch, policy, reference)
    settings = settings | ({"label_smoothing": smoothing} if smoothing else {})
    our_loss, metrics = ours(name, {"beta": 0.3, "sft_weight": sft, **settings}, batch, policy, reference)
    the_same(our_loss, their_loss, policy)
    of_sums = not settings.get("length_normalised") and name != "ipo"  # ours are the rewards that the loss sees
    for key in ("chosen", "rejected", "margins", "accuracies") if of_sums else ():
        assert metrics[f"rewards/{key}"] == pytest.approx(their_metrics[f"rewards/{key}"][0], rel=1e-6)
    for key in ("logps/chosen", "logps/rejected"):
        assert metrics[key] == pytest.approx(their_metrics[key][0], rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "name", "settings", "theirs"),
    [
        ("sigmoid", "cpo", {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
        ("sigmoid", "cpo", {}, {}),
        ("simpo", "simpo", {"gamma": 0.8}, {"simpo_gamma": 0.8}),
    ],
)
def test_without_a_reference(kind, name, settings, theirs, trl):
    batch = pairs(N)
    policy = some(batch, 1, torch.float64).requires_grad_()
    trainer = bare(trl.cpo, beta=0.4, loss_type=kind, alpha=0.0, **{"label_smoothing": 0.0, **theirs})
    losses, chosen, rejected = trainer.cpo_loss(*sums(batch, policy, mean=kind == "simpo"))
    our_loss, metrics = ours(name, {"beta": 0.4, "sft_weight": 0.0, **settings}, batch, policy, policy)
    the_same(our_loss, losses.mean(), policy)
    assert metrics["rewards/chosen"] == pytest.approx(float(chosen.mean()))
    assert metrics["rewards/rejected"] == pytest.approx(float(rejected.mean()))
    assert metrics["rewards/accuracies"] == float((chosen > rejected).double().mean())


def test_conservative_dpo_is_cpo_with_log_ratios(trl):
    """TRL's DPO has no smoothed sigmoid any more; its CPO does, and the two differ in what they are given alone."""
    batch = pairs(N)
    policy, reference = (some(batch, seed, torch.float64) for seed in (1, 2))
    policy.requires_grad_()
    trainer = bare(trl.cpo, beta=0.4, loss_type="sigmoid", alpha=0.0, label_smoothing=0.15)
    losses, *_ = trainer.cpo_loss(*sums(batch, policy - reference))
    our_loss, _ = ours("dpo", {"beta": 0.4, "label_smoothing": 0.15}, batch, policy, reference)
    the_same(our_loss, losses.mean(), policy)


def test_odds_ratio(trl):
    batch = pairs(N)
    policy = some(batch, 1).requires_grad_()  # TRL computes in float32
    losses, chosen, _, _, log_odds = bare(trl.orpo, beta=0.4).odds_ratio_loss(*sums(batch, policy, mean=True))
    our_loss, metrics = ours("orpo", {"beta": 0.4, "sft_weight": 0.0}, batch, policy, policy)
    torch.testing.assert_close(our_loss.float(), -losses.mean(), rtol=1e-5, atol=0)
    one, other = (torch.autograd.grad(x, policy)[0] for x in (our_loss, -losses.mean()))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert metrics["log_odds_ratio"] == pytest.approx(float(log_odds.detach()), rel=1e-5)
    assert metrics["rewards/chosen"] == pytest.approx(float(chosen.detach().mean()), rel=1e-5)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.3)])
def test_judged_answers(weights, flipped, trl):
    """KTOTrainer's own loss and metrics; it asks its model about the mismatched answers first."""
    kto = get("kto")
    config = kto.config(name="kto", beta=0.3, desirable_weight=weights[0], undesirable_weight=weights[1])
    policy, reference = (judged.Table(seed) for seed in ((3, 1) if flipped else (1, 3)))
    policy.of.requires_grad_()
    (batch,) = judged.batches(7, 7)
    own, other = batch.only("desirable", "undesirable"), batch.only("mismatched")
    labels = torch.tensor([role == "desirable" for role in own.roles])

    def rectangle(rows: Any, values: Tensor) -> Tensor:
        starts: dict[int, int] = {}
        columns = torch.tensor([i - starts.setdefault(int(r), i) for i, r in enumerate(rows.labels.row)])
        return values.new_zeros(7, 40).index_put((rows.labels.row, columns), values)

    spoken = [rectangle(rows, policy.tokens(rows).logprob) for rows in (other, own)]
    against = [rectangle(rows, reference.tokens(rows).logprob).sum(1) for rows in (other, own)]
    flat = torch.zeros(7, 40)
    answers = iter(SimpleNamespace(log_probs=x, entropy=flat, mean_logits=flat) for x in spoken)
    mask = torch.ones(7, 41).long()
    inputs = {
        f"{kind}{name}": mask for kind in ("", "KL_") for name in ("input_ids", "attention_mask", "completion_mask")
    }
    inputs |= {"label": labels, "ref_KL_logps": against[0], "ref_logps": against[1]}
    trainer = bare(
        trl.kto,
        model=SimpleNamespace(training=False),
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=0.3,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    their_loss = trainer._compute_loss(lambda **inputs: next(answers), inputs, False)
    shared = kto.shared(policy, reference, [batch], config)
    found = kto.loss(policy, reference, batch, config, {name: value.detach() for name, value in shared.items()})
    the_same(found.terms[0].sum / kto.weights(batch, config)[0], their_loss, policy.of)
    for key in ("kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        total, count = found.metrics[key]
        assert float(total / count) == pytest.approx(trainer._metrics["eval"][key][0], rel=1e-6), key
