"""Passing over the blocks below the lowest delta changes no answer and no gradient beyond rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from peftctl import methods
from peftctl.adapter import attach
from peftctl.batch import build
from peftctl.frozen import Frozen, find
from peftctl.methods.attachment import Attachment
from peftctl.opened import policy_of
from peftctl.policy import Policy, Reference, checkpointed
from peftctl.row import Row
from peftctl.surgery import skeleton
from tests import models

LAYERS = 4
TOP: dict[str, Any] = {"rank": 4, "layers": [2, 3]}
FAMILIES = ["llama", "gpt2", "gemma2", "mistral"]


def deep(name: str) -> Any:
    """The tiny model of that name with more layers."""
    config_class, model_class, values = models._MODELS[name]
    torch.manual_seed(0)
    layers = {"n_layer" if "n_layer" in values else "num_hidden_layers": LAYERS}
    return getattr(transformers, model_class)(getattr(transformers, config_class)(**values | layers)).eval()


def made(name: str, method: str = "lora", layout: str = "auto", **settings: Any) -> Policy:
    model = deep(name)
    chosen = methods.get(method)
    attachment = attach(model, chosen, chosen.config(name=method, **settings), 0)
    policy = policy_of(model, attachment, skeleton(model).dimensions.layers, layout)
    with torch.no_grad():
        for parameter in attachment.trainable().values():
            parameter.add_(0.05 * torch.randn_like(parameter))  # as if it had been trained a little
    return policy.eval()


def rows() -> list[Row]:
    """Some share a start, one is of one token, two are equal."""
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, models.VOCABULARY, (length,), generator=generator).tolist())

    start = ids(6)
    tokens = [start + ids(5), start + ids(9), ids(12), (7,), start + ids(3), ids(4)]
    return [Row(own, (0.0,) + (1.0,) * (len(own) - 1)) for own in [*tokens, tokens[1]]]


def found(policy: Policy) -> Frozen:
    frozen = find(policy, rows()[0])
    assert frozen is not None
    return frozen


def known(frozen: Frozen, of: Sequence[Row]) -> Callable[[Row], Tensor | None]:
    return {row: answer for row in of for answer in frozen.answers([row])}.get


def gradients(policy: Policy, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    policy.zero_grad()
    logprob = policy.tokens(batch).logprob
    logprob.sum().backward()  # type: ignore[no-untyped-call]
    grads = {n: p.grad.clone() for n, p in policy.attachment.trainable().items() if p.grad is not None}
    assert len(grads) == len(policy.attachment.trainable())
    return logprob.detach(), grads


def assert_close(one: Tensor, other: Tensor) -> None:
    assert float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


@pytest.mark.parametrize("layout", ["shared", "joined"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", FAMILIES)
def test_answers_and_gradients_are_those_of_all_blocks(name: str, fused: bool, layout: str) -> None:
    policy = made(name, layout=layout, **TOP)
    if fused:
        policy.fuse(pack=False)
    frozen = found(policy)
    assert frozen.count == 2
    assert frozen.fault(rows()[:2]) is None
    batch = build(rows())
    logprob, grads = gradients(policy, batch)
    assert policy.attention_calls == LAYERS
    with frozen.passed_over(known(frozen, rows())):
        skipped, others = gradients(policy, batch)
    assert policy.attention_calls == LAYERS - 2
    assert_close(skipped, logprob)
    for key, grad in grads.items():
        assert_close(others[key], grad)
    assert torch.equal(policy.tokens(batch).logprob, logprob)  # afterwards all is as it was
    assert policy.attention_calls == LAYERS


@pytest.mark.parametrize("name", FAMILIES)
def test_recomputing_blocks_changes_no_bit(name: str) -> None:
    results = []
    for recompute in (False, True):
        policy = made(name, **TOP)
        if recompute:
            checkpointed(policy.model)
        for module in policy.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        frozen = found(policy)
        policy.train()
        with frozen.passed_over(known(frozen, rows())):
            results.append(gradients(policy, build(rows())))
    (logprob, grads), (again, others) = results
    assert torch.equal(again, logprob)
    assert all(torch.equal(others[key], grad) for key, grad in grads.items())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_reference_uses_the_same_states(name: str) -> None:
    policy = made(name, **TOP)
    frozen, batch = found(policy), build(rows())
    reference = Reference(policy, None)
    expected = reference.tokens(batch).logprob
    with frozen.passed_over(known(frozen, rows())):
        assert_close(reference.tokens(batch).logprob, expected)
        assert policy.attention_calls == LAYERS - 2


def test_a_batch_with_a_row_that_is_not_known_is_computed_whole() -> None:
    policy = made("llama", **TOP)
    frozen, batch = found(policy), build(rows())
    expected = policy.tokens(batch).logprob
    with frozen.passed_over(known(frozen, rows()[1:])):
        assert torch.equal(policy.tokens(batch).logprob, expected)
        assert policy.attention_calls == LAYERS


@pytest.mark.parametrize(
    ("name", "method", "settings", "count"),
    [
        ("llama", "lora", {"layers": [0, 3]}, None),
        ("llama", "lora", {"layers": [1]}, 1),
        ("llama", "lora", {"layers": [3]}, 3),
        ("llama", "lora", {"target_modules": ["lm_head"]}, LAYERS),
        ("llama", "lora", {"target_modules": ["embed_tokens"]}, None),
        ("llama", "lora", {"target_modules": r".*embed_tokens|.*3\.mlp\.up_proj"}, None),
        ("opt", "lora", {"target_modules": r".*\.2\.fc1"}, 2),
        ("llama", "prefix", {}, None),
        ("llama", "bottleneck", {}, None),
        ("gpt2", "bitfit", {}, None),
        ("bloom", "lora", TOP, None),  # padded
    ],
)
def test_the_blocks_below_the_lowest_delta_are_found(
    name: str, method: str, settings: dict[str, Any], count: int | None
) -> None:
    frozen = find(made(name, method, **({"rank": 4} | settings if method == "lora" else settings)), rows()[0])
    assert (frozen and frozen.count) == count
    if frozen is not None:
        assert frozen.fault(rows()[:2]) is None


def test_the_weights_are_those_that_the_answers_depend_on() -> None:
    policy = made("llama", **TOP)
    frozen = found(policy)
    before = frozen.answers(rows())[0]
    names = {name for name, _ in frozen.weights()}
    for name, parameter in policy.model.named_parameters():
        with torch.no_grad():
            parameter.mul_(2)  # exactly undone
            changed = not torch.equal(frozen.answers(rows())[0], before)
            parameter.div_(2)
        assert changed <= (name in names), name
    assert not any(".layers.2." in name or ".layers.3." in name for name in names)


def test_dropout_in_the_frozen_blocks_forbids_it() -> None:
    policy = made("gpt2", **TOP)
    frozen = found(policy)
    assert frozen.fault(rows()[:2]) is None
    policy.train()
    assert frozen.fault(rows()[:2]) == "the base has dropout"
    assert policy.training


def test_a_change_beside_the_deltas_places_is_noticed() -> None:
    policy = made("llama", **TOP)
    frozen = found(policy)

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        attachment: Attachment = policy.attachment
        return output * (1 + next(iter(attachment.trainable().values())).mean()) if attachment.enabled else output

    policy.model.get_submodule(frozen.paths[0]).register_forward_hook(hook)
    assert frozen.fault(rows()[:2]) == "they change with the adapter"


def test_a_state_that_is_not_the_blocks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = found(made("llama", **TOP))
    answers = Frozen._answers
    monkeypatch.setattr(Frozen, "_answers", lambda *args: [answer.flip(1) for answer in answers(*args)])
    assert "differ by" in str(frozen.fault(rows()[:2]))
