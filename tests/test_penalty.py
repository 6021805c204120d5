"""A method's penalty is in a step's loss once, however the step is cut, and not in the loss on held-out rows."""

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from peftctl.distributed import ALONE
from peftctl.methods.attachment import Attachment
from peftctl.penalty import penalised
from peftctl.trainer import Question, _backward, evaluate
from tests.test_trainer import BOTH, Shuffled, Toy, make_rows


class Drawn(Attachment):
    """Draws every parameter to zero."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.drawn = list(parameters.values())

    def penalty(self) -> torch.Tensor:
        return torch.stack([p.square().sum() for p in self.drawn]).sum()


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_it_counts_once_a_step_however_that_is_cut(name: str, size: int) -> None:
    found = {}
    for wanted in (False, True):
        toy, (objective, config) = Toy(), BOTH[name]
        attachment = Drawn(dict(toy.named_parameters())) if wanted else Attachment()
        question = Question(penalised(objective, attachment), config, toy)
        batches, _ = Shuffled(make_rows(8), size, 4 // size).step(0)
        loss, metrics = _backward(question, batches, 1, torch.device("cpu"), ALONE)
        found[wanted] = (loss, {n: p.grad for n, p in toy.named_parameters()}, metrics)
    penalty = sum(float(p.detach().square().sum()) for p in Toy().parameters())
    assert found[True][0] == pytest.approx(found[False][0] + penalty, rel=1e-5)
    assert found[True][2]["penalty"] == pytest.approx(penalty, rel=1e-5) and "penalty" not in found[False][2]
    for parameter, (own, drawn) in zip(
        Toy().parameters(), zip(*(f[1].values() for f in found.values()), strict=True), strict=True
    ):
        torch.testing.assert_close(drawn, (0 if own is None else own) + 2 * parameter.detach(), rtol=1e-4, atol=1e-5)


def test_the_loss_on_held_out_rows_is_the_objectives_own() -> None:
    toy, (objective, config) = Toy(), BOTH["two"]
    losses = []
    for attachment in (Attachment(), Drawn(dict(toy.named_parameters()))):
        batches = Shuffled(make_rows(8), validation=tuple(make_rows(6))).evaluation()
        found = evaluate(Question(penalised(objective, attachment), config, toy), batches, "cpu")
        assert found is not None
        losses.append(found["loss"])
    assert losses[0] == losses[1]


def test_without_a_penalty_the_objective_is_itself() -> None:
    assert penalised(BOTH["sft"][0], Attachment()) is BOTH["sft"][0]
