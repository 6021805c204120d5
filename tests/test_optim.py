"""Schedules have the shape they promise; an optimizer's state comes back by name, to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peftctl import optim
from peftctl.errors import FormatError

KINDS = ["constant", "linear", "cosine"]
OPTIMIZERS = ["adamw", "sgd", "adafactor"]
SHAPES = {"matrix": (5, 7), "other": (7, 3), "vector": (6,), "cube": (2, 3, 4)}


@settings(deadline=None)
@given(kind=st.sampled_from(KINDS), total=st.integers(1, 200), share=st.floats(0, 1))
def test_schedule_rises_to_one_then_never_rises(kind: str, total: int, share: float) -> None:
    warmup = int(total * share)
    values = [optim.schedule(kind, step, total, warmup) for step in range(1, total + 1)]
    peak = max(1, warmup) - 1
    assert values[peak] == 1 == max(values)
    assert all(value > 0 for value in values), "no step is wasted"
    assert values[:peak] == pytest.approx([step / warmup for step in range(1, peak + 1)])
    assert all(a >= b for a, b in zip(values[peak:], values[peak + 1 :], strict=False))
    if kind != "constant":
        assert optim.schedule(kind, total + 1, total, warmup) == pytest.approx(0, abs=1e-9) or warmup == total + 1


def test_schedules_halfway() -> None:
    """From the peak at step 10 to the zero at step 110, half is at 60."""
    assert [optim.schedule(kind, 60, 109, 10) for kind in KINDS] == pytest.approx([1, 0.5, 0.5])
    assert optim.schedule("cosine", 35, 109, 10) > optim.schedule("linear", 35, 109, 10)


def parameters(seed: int = 0, names: tuple[str, ...] = tuple(SHAPES)) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    return {name: made[name] for name in names}


def step(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], number: int) -> None:
    for name in sorted(parameters):
        generator = torch.Generator().manual_seed(1000 * number + len(name))
        parameters[name].grad = torch.randn(parameters[name].shape, generator=generator)
    optimizer.step()


def build(kind: str, of: dict[str, nn.Parameter], multipliers: dict[str, float] | None = None) -> torch.optim.Optimizer:
    return optim.build(of, multipliers or {}, kind, 1e-2, (0.9, 0.99), weight_decay=0.1)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_restored_optimizer_goes_on_bit_for_bit_in_any_order(kind: str) -> None:
    ours, multipliers = parameters(), {"other": 16.0}
    first = build(kind, ours, multipliers)
    for number in range(3):
        step(first, ours, number)
    tensors, facts = optim.state(first, ours)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    theirs = parameters(seed=1, names=tuple(reversed(SHAPES)))
    for name, parameter in theirs.items():
        parameter.data.copy_(ours[name].data)
    second = build(kind, theirs, multipliers)
    optim.restore(second, theirs, tensors, facts)
    again, _ = optim.state(second, theirs)
    assert again.keys() == tensors.keys() and all(torch.equal(again[k], tensors[k]) for k in tensors)
    for number in range(3, 6):
        step(first, ours, number)
        step(second, theirs, number)
    assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


@pytest.mark.fault(3)
def test_moments_are_not_cast_to_the_parameters_type() -> None:
    half = {"w": nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))}
    optimizer = build("adamw", half)
    moment = torch.full((4, 4), 1 + 2**-20)
    optim.restore(optimizer, half, {"exp_avg.w": moment}, {"optimizer": "AdamW"})
    kept = optimizer.state[half["w"]]["exp_avg"]
    assert kept.dtype == torch.float32 and torch.equal(kept, moment)
    assert kept.data_ptr() != moment.data_ptr(), "the optimizer owns its moments"


def test_names_with_dots_and_nothing_to_remember() -> None:
    named = {"model.layers.0.q.a": nn.Parameter(torch.ones(2, 2)), "idle": nn.Parameter(torch.ones(2))}
    optimizer = build("adamw", named)
    assert optim.state(optimizer, named)[0] == {}
    named["model.layers.0.q.a"].grad = torch.ones(2, 2)
    optimizer.step()
    assert set(optim.state(optimizer, named)[0]) == {
        f"{key}.model.layers.0.q.a" for key in ("step", "exp_avg", "exp_avg_sq")
    }


def test_restore_refuses_another_optimizer_name_or_shape() -> None:
    own = {"w": nn.Parameter(torch.ones(2, 3))}
    optimizer = build("adamw", own)
    with pytest.raises(FormatError, match=r"written by SGD, this run uses AdamW; set train\.optimizer back"):
        optim.restore(optimizer, own, {}, {"optimizer": "SGD"})
    with pytest.raises(FormatError, match=r"exp_avg\.v: no such parameter; exp_avg\.w: \(3, 2\) for .* \(2, 3\)"):
        bad = {"exp_avg.v": torch.ones(2), "exp_avg.w": torch.ones(3, 2)}
        optim.restore(optimizer, own, bad, {"optimizer": "AdamW"})
    assert not optimizer.state, "refused whole"


def test_multipliers_and_decay_reach_the_right_parameters() -> None:
    ours = parameters()
    optimizer = build("adamw", ours, {"other": 16.0})
    assert optim.scale(optimizer, 1e-2, 0.5) == pytest.approx(5e-3)
    seen = {
        name: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name, parameter in ours.items()
        if any(parameter is own for own in group["params"])
    }
    assert seen["matrix"] == seen["cube"] == pytest.approx((5e-3, 0.1))
    assert seen["other"] == pytest.approx((8e-2, 0.1))
    assert seen["vector"] == pytest.approx((5e-3, 0.0))


def test_adamw_follows_the_papers_formula() -> None:
    w = {"w": nn.Parameter(torch.tensor([[1.0]]))}
    optimizer = optim.build(w, {}, "adamw", 0.1, (0.9, 0.99), weight_decay=0.5)
    w["w"].grad = torch.tensor([[2.0]])
    optimizer.step()
    # after one step both corrected moments are g and g^2: a step of lr, after decay by lr * 0.5
    assert w["w"].item() == pytest.approx(1.0 * (1 - 0.1 * 0.5) - 0.1)
