"""SFT is token cross entropy, weighed by token."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from peftctl.batch import build
from peftctl.head import head_of
from peftctl.methods.attachment import Attachment
from peftctl.objectives import get, names
from peftctl.objectives.base import TokenStats
from peftctl.policy import Layout, Policy
from peftctl.row import Example, Message, Row
from tests.models import tiny

SFT = get("sft")
CONFIG = SFT.config(name="sft")


class Logits:
    """A policy that is a table: one row of logits for each token of the batch."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    def tokens(self, batch, mean: bool = False) -> TokenStats:
        logits = self.table[batch.labels.source]
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(1, batch.labels.target[:, None])[:, 0]
        return TokenStats(chosen, logits.argmax(-1) == batch.labels.target, logprobs.mean(-1) if mean else None)


def batch():
    rows = [Row((1, 2, 3, 4), (0.0, 0.0, 1.0, 1.0)), Row((1, 2, 5), (0.0, 0.0, 0.5)), Row((6, 7), (0.0, 2.0))]
    return build(rows)


def test_equals_cross_entropy_on_explicit_logits():
    forest = batch()
    table = torch.randn(len(forest), 9, generator=torch.manual_seed(0), requires_grad=True)
    loss = SFT.loss(Logits(table), None, forest, CONFIG)
    logits, target, weight = table[forest.labels.source], forest.labels.target, forest.labels.weight
    expected = (functional.cross_entropy(logits, target, reduction="none") * weight).sum()
    torch.testing.assert_close(loss.terms[0].sum, expected)
    assert len(loss.terms) == 1 and loss.terms[0].coefficient == 1.0
    ours, theirs = (torch.autograd.grad(x, table, retain_graph=True)[0] for x in (loss.terms[0].sum, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing_equals_cross_entropys(smoothing):
    forest, config = batch(), SFT.config(name="sft", label_smoothing=smoothing)
    table = torch.randn(len(forest), 9, generator=torch.manual_seed(0), requires_grad=True)
    loss = SFT.loss(Logits(table), None, forest, config)
    logits, target, weight = table[forest.labels.source], forest.labels.target, forest.labels.weight
    rows = functional.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(loss.terms[0].sum, (rows * weight).sum())
    ours, theirs = (torch.autograd.grad(x, table)[0] for x in (loss.terms[0].sum, (rows * weight).sum()))
    torch.testing.assert_close(ours, theirs)
    plain = SFT.loss(Logits(table), None, forest, CONFIG)
    assert loss.metrics["nll_loss"] == plain.metrics["loss"] and "nll_loss" not in plain.metrics
    assert SFT.weights(forest, config) == SFT.weights(forest, CONFIG)


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_label_smoothing_of_a_model(layout):
    model, config = tiny("llama"), SFT.config(name="sft", label_smoothing=0.2)
    policy = Policy(model, Attachment(), Layout(layout), head_of(model)).eval()
    row = Row((1, 5, 9, 7, 3), (0.0, 0.0, 1.0, 1.0, 1.0))
    with torch.no_grad():
        found = SFT.loss(policy, None, build([row, Row((4, 6), (0.0, 0.0))]), config).terms[0].sum
        logits = model(input_ids=torch.tensor([row.ids])).logits[0, 1:4]
    expected = functional.cross_entropy(logits, torch.tensor(row.ids[2:]), reduction="sum", label_smoothing=0.2)
    torch.testing.assert_close(found, expected)


def test_weights_and_metrics_are_sums_and_counts():
    forest = batch()
    table = torch.full((len(forest), 9), -1.0)
    table[:, 7] = 1.0  # right for the one label 7, of weight 2 in 4.5
    loss = SFT.loss(Logits(table), None, forest, CONFIG)
    assert SFT.weights(forest, CONFIG) == (4.5,)
    total, count = loss.metrics["token_accuracy"]
    assert (float(total), float(count)) == (2.0, 4.5)
    assert float(loss.metrics["loss"][0]) == float(loss.terms[0].sum) and float(loss.metrics["loss"][1]) == 4.5
    assert not any(value.requires_grad for pair in loss.metrics.values() for value in pair)


def test_encodes_dialogues_and_plain_answers():
    class Encoder:
        def dialogue(self, messages, trained, tools=()):
            return (len(messages),), (float(trained == "last"),)

        def completion(self, prompt, answer):
            return (len(prompt), len(answer)), (0.0, 1.0)

        def text(self, text):
            return (len(text),), (1.0,)

    talk = Example("messages", "", (Message("user", "a"), Message("assistant", "b")))
    assert SFT.encode(talk, Encoder(), CONFIG) == (Row((2,), (0.0,)),)
    assert SFT.encode(talk, Encoder(), SFT.config(name="sft", trained="last")) == (Row((2,), (1.0,)),)
    plain = Example("completion", "", prompt_text="abc", completion="d")
    assert SFT.encode(plain, Encoder(), CONFIG) == (Row((3, 1), (0.0, 1.0)),)
    assert SFT.encode(plain, Encoder(), SFT.config(name="sft", trained="all")) == (Row((3, 1), (1.0, 1.0)),)
    assert SFT.encode(Example("text", "", completion="abc"), Encoder(), CONFIG) == (Row((3,), (1.0,)),)
    asked = Example("completion", "", (Message("user", "a"), Message("assistant", "b")))
    assert SFT.encode(asked, Encoder(), CONFIG) == (Row((2,), (0.0,)),)


def test_is_found_and_strict():
    assert {"sft", "dpo"} <= set(names()) and SFT.reference(CONFIG) is None and SFT.base_dropout
    for wrong in ("everything", [], ["bot"]):
        with pytest.raises(ValidationError):
            SFT.config(name="sft", trained=wrong)
