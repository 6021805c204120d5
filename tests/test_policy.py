"""The waist: switch, reference, gradient checkpointing, dropout, generation, for whatever method there is."""

import math

import pytest
import torch

from peftctl import methods, objectives
from peftctl.adapter import attach
from peftctl.batch import build
from peftctl.errors import TargetError
from peftctl.generation import generate, generate_plainly
from peftctl.opened import policy_of
from peftctl.policy import Policy, Reference, checkpointed, frozen_copy
from peftctl.row import Row
from peftctl.surgery import skeleton, without_dropout
from tests.models import tiny


def pair(example: int) -> list[Row]:
    generator = torch.Generator().manual_seed(example)
    prompt, chosen, rejected = (torch.randint(5, 100, (n,), generator=generator).tolist() for n in (6, 4, 7))
    rows = [(prompt + answer, len(answer)) for answer in (chosen, rejected)]
    return [
        Row(tuple(ids), (0.0,) * 6 + (1.0,) * n, example, role)
        for (ids, n), role in zip(rows, ("chosen", "rejected"), strict=True)
    ]


def served(*names: str) -> list[tuple[str, str]]:
    """Architecture and method where the method serves it as it comes."""
    found = []
    for name in names:
        table = skeleton(tiny(name))
        for method in methods.names():
            try:
                methods.get(method).count(table, methods.get(method).config(name=method))
            except TargetError:
                continue
            found.append((name, method))
    return found


def made(name: str, method: str) -> Policy:
    model = tiny(name)
    chosen = methods.get(method)
    attachment = attach(model, chosen, chosen.config(name=method), 0)
    return policy_of(model, attachment, skeleton(model).dimensions.layers)


def shaken(policy: Policy) -> Policy:
    """As if it had been trained a little."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.attachment.trainable().values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return policy


def dpo_loss(policy: Policy, reference: Reference) -> float:
    objective = objectives.get("dpo")
    config = objective.config(name="dpo")
    batch = build(pair(0) + pair(1) + pair(2))
    loss = objective.loss(policy, reference, batch, config)
    return float(loss.terms[0].sum.detach() / objective.weights(batch, config)[0])


@pytest.mark.parametrize(("name", "method"), served("llama", "gpt2"))
def test_the_first_preference_loss_is_ln_2(name: str, method: str) -> None:
    policy = made(name, method)
    identity = methods.get(method).traits(methods.get(method).config(name=method)).starts_as_identity
    reference = Reference(policy, None if identity else frozen_copy(policy.attachment))
    without_dropout(policy.model)
    policy.train()
    assert dpo_loss(policy, reference) == float(torch.tensor(math.log(2), dtype=torch.float32))
    shaken(policy)
    assert dpo_loss(policy, reference) != pytest.approx(math.log(2), abs=1e-6)
    assert policy.training


@pytest.mark.parametrize(("name", "method"), served("llama", "gpt2"))
def test_a_continued_adapter_is_its_own_reference(name: str, method: str) -> None:
    policy = shaken(made(name, method))
    without_dropout(policy.model)
    copy = frozen_copy(policy.attachment)
    assert dpo_loss(policy, Reference(policy, copy)) == float(torch.tensor(math.log(2), dtype=torch.float32))
    shaken(policy)
    assert dpo_loss(policy, Reference(policy, copy)) != pytest.approx(math.log(2), abs=1e-6)
    assert all(torch.isfinite(p).all() for p in policy.attachment.trainable().values())


@pytest.mark.parametrize(("name", "method"), served("llama", "gpt2"))
def test_recomputing_blocks_changes_no_gradient(name: str, method: str) -> None:
    policy = shaken(made(name, method))
    without_dropout(policy.model)
    if methods.get(method).traits(methods.get(method).config(name=method)).needs_cache:
        return  # refused by the recipe
    grads = []
    for recompute in (False, True):
        if recompute:
            checkpointed(policy.model)
        policy.train().zero_grad()
        policy.tokens(build(pair(0) + pair(1))).logprob.sum().backward()
        grads.append({n: p.grad.clone() for n, p in policy.attachment.trainable().items() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "method"), served("llama", "gpt2", "bloom", "mistral"))
def test_generating_with_a_cache_gives_the_full_context_tokens(name: str, method: str) -> None:
    policy = shaken(made(name, method))
    ids = pair(0)[0].ids
    new = generate(policy, ids, max_new_tokens=8, end=())
    assert new == generate_plainly(policy, ids, 8, ())
    seen: list[int] = []
    assert generate(policy, ids, max_new_tokens=8, end=[new[2]], on_token=seen.append) == new[: new.index(new[2]) + 1]
    assert seen == new[: new.index(new[2]) + 1]


def test_dropout_of_the_base_can_be_silenced() -> None:
    for name in ("gpt2", "opt", "bert"):
        model = without_dropout(tiny(name).train())
        ids = torch.tensor([pair(0)[0].ids])
        torch.testing.assert_close(model(input_ids=ids)[0], model.eval()(input_ids=ids)[0])
