"""What every method must keep, each promise a function of a method's config and a tiny model's name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from peftctl import methods, seq2seq
from peftctl.errors import Unfoldable
from peftctl.methods.attachment import Attachment, Delta, Virtual
from peftctl.methods.base import MethodConfig
from peftctl.surgery import find, frozen, skeleton
from tests.models import ENCODERS, inputs, logits, tiny


def config(name: str, **keys: Any) -> MethodConfig:
    return methods.get(name).config(name=name, **keys)


def attached(config: MethodConfig, name: str, seed: int = 0) -> tuple[PreTrainedModel, Attachment]:
    """A tiny model with the method on it. Raises TargetError where the method cannot serve it."""
    model = frozen(tiny(name))
    torch.manual_seed(seed)
    attachment = methods.get(config.name).attach(model, config).eval()
    attachment.install(model)
    return model, attachment


def primed(model: PreTrainedModel, virtual: Virtual, rows: int) -> dict[str, Any]:
    """A cache with the virtual tokens in it, under the name that the model gives the argument."""
    # transformers 5 renamed it on the way
    accepted = inspect.signature(model.base_model.forward).parameters
    name = "cache" if "cache" in accepted else "past_key_values"
    if virtual.embeds is not None:
        output = model.base_model(inputs_embeds=virtual.embeds.expand(rows, -1, -1), use_cache=True)
        return {name: output.past_key_values}
    cache = DynamicCache()
    for layer, (k, v) in enumerate(zip(virtual.keys, virtual.values, strict=True)):
        cache.update(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1), layer)
    return {name: cache}


def forward(model: PreTrainedModel, attachment: Attachment, ids: Tensor | None = None) -> Tensor:
    """The logits of the real tokens, with the virtual ones, if any, before them: in a cache, or as embeddings."""
    call: dict[str, Any] = inputs(model) if ids is None else {"input_ids": ids}
    virtual = attachment.virtual()
    if virtual is not None and virtual.paths:
        with seq2seq.prefixed(model, virtual):
            return model(**call).logits
    if virtual is not None:
        rows, length = call["input_ids"].shape
        call["attention_mask"] = torch.ones(rows, virtual.length + length, dtype=torch.long)
        if virtual.embeds is None:
            call |= primed(model, virtual, rows)
        else:
            real = model.get_input_embeddings()(call.pop("input_ids"))
            call["inputs_embeds"] = torch.cat([virtual.embeds.expand(rows, -1, -1), real], dim=1)
    logits: Tensor = model(**call).logits
    return logits[:, virtual.run :] if virtual is not None else logits


@torch.no_grad()
def answer(model: PreTrainedModel, attachment: Attachment) -> Tensor:
    return forward(model, attachment)


@torch.no_grad()
def disturb(attachment: Attachment, seed: int = 3) -> None:
    """Move every trained number away from where it started."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in attachment.trainable().values():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def loss(model: PreTrainedModel, attachment: Attachment) -> Tensor:
    logits = forward(model, attachment)
    targets = inputs(model, seed=7)["input_ids"]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def keeps_shapes_and_counts(config: MethodConfig, name: str) -> None:
    model, attachment = attached(config, name)
    base = tiny(name)
    assert answer(model, attachment).shape == base(**inputs(base)).logits.shape
    counted = methods.get(config.name).count(skeleton(base), config)
    assert counted.total == sum(p.numel() for p in attachment.trainable().values())
    per_place: dict[str, int] = dict.fromkeys(counted.places, 0)
    for key, parameter in attachment.trainable().items():
        place = next(p for p in sorted(counted.places, key=len, reverse=True) if f"{key}.".startswith(f"{p}."))
        per_place[place] += parameter.numel()
    assert per_place == counted.places


def starts_as_declared(config: MethodConfig, name: str) -> None:
    """Step 0 is the base bit for bit where the method says so, and is not where it says not."""
    model, attachment = attached(config, name)
    same = torch.equal(answer(model, attachment), logits(tiny(name)))
    assert same == methods.get(config.name).traits(config).starts_as_identity


def is_the_base_when_disabled(config: MethodConfig, name: str) -> None:
    model, attachment = attached(config, name)
    disturb(attachment)
    base = logits(tiny(name))
    changed = answer(model, attachment)
    assert not torch.equal(changed, base)
    with attachment.disabled():
        assert torch.equal(answer(model, attachment), base)
    assert torch.equal(answer(model, attachment), changed)


def trains_exactly_its_own(config: MethodConfig, name: str) -> None:
    """Every one of its tensors moves within two steps, nothing of the base does, and the loss falls."""
    model, attachment = attached(config, name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start = {key: p.detach().clone() for key, p in attachment.trainable().items()}
    trained = {id(p) for p in attachment.trainable().values()}
    assert trained == {id(p) for p in attachment.parameters() if p.requires_grad}
    assert not any(p.requires_grad for p in model.parameters())
    optimizer = torch.optim.AdamW(attachment.trainable().values(), lr=0.02, weight_decay=0.0)
    losses, reached = [], set()
    for step in range(10):
        optimizer.zero_grad()
        value = loss(model, attachment)
        value.backward()
        reached |= {k for k, p in attachment.trainable().items() if p.grad is not None and bool(p.grad.any())}
        optimizer.step()
        losses.append(value.item())
        if step == 1:
            assert reached == set(start), f"no gradient reached {sorted(set(start) - reached)}"
            moved = {key for key, p in attachment.trainable().items() if not torch.equal(p, start[key])}
            assert moved == set(start)
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def saves_and_loads(config: MethodConfig, name: str) -> None:
    model, attachment = attached(config, name)
    disturb(attachment)
    saved = {key: tensor.detach().clone() for key, tensor in attachment.tensors().items()}
    assert set(attachment.trainable()) <= set(saved)
    other, fresh = attached(config, name, seed=11)
    fresh.load(saved)
    assert torch.equal(answer(other, fresh), answer(model, attachment))


def leaves_no_trace(config: MethodConfig, name: str) -> None:
    base = tiny(name)
    model, attachment = attached(config, name)
    assert list(model.state_dict()) == list(base.state_dict())
    disturb(attachment)
    answer(model, attachment)
    attachment.remove()
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model), logits(base))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def refusal(delta: Delta) -> Unfoldable | None:
    """What a delta says when it is asked to fold; None when it would."""
    try:
        for parameter in delta.folds() or ("weight",):
            delta.fold(parameter, next(delta.parameters()).detach())
    except Unfoldable as error:
        return error
    return None


def folds_or_refuses(config: MethodConfig, name: str) -> None:
    """The folded weights alone answer as the deltas did, or the refusal is one sentence."""
    model, attachment = attached(config, name)
    disturb(attachment)
    if not methods.get(config.name).traits(config).foldable:
        refusals = [str(e) for _, delta in attachment.named_deltas() if (e := refusal(delta)) is not None]
        assert refusals and all("\n" not in said and len(said.split()) > 5 for said in refusals)
        return
    changed = answer(model, attachment)
    attachment.remove()
    with torch.no_grad():
        for path, delta, _ in attachment.places:
            module = find(model, path)
            for parameter in delta.folds():
                stored = module.get_parameter(parameter)
                folded = delta.fold(parameter, stored)
                assert folded.dtype == torch.float32 and folded.shape == stored.shape
                # a weight of its own: a tied one would change the other place as well
                setattr(module, parameter, torch.nn.Parameter(folded))
    torch.testing.assert_close(model(**inputs(model)).logits, changed, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def generates_what_the_full_context_says(config: MethodConfig, name: str) -> None:
    """transformers' own greedy decoding, with and without its cache, gives the tokens of a loop over whole rows."""
    if name in ENCODERS:
        return  # an encoder generates nothing
    model, attachment = attached(config, name)
    disturb(attachment)
    model.generation_config.eos_token_id = None
    prompt, new = inputs(model, rows=1)["input_ids"], 6
    ids = prompt
    for _ in range(new):
        ids = torch.cat([ids, forward(model, attachment, ids)[:, -1:].argmax(-1)], dim=1)
    virtual = attachment.virtual()
    # stand-ins for what the cache already holds, so that positions and mask count it
    held = 0 if virtual is None else virtual.length
    start = torch.cat([prompt.new_zeros(1, held), prompt], dim=1)
    for cached in (True,) if virtual is not None else (True, False):
        extra = {"use_cache": cached} if virtual is None else primed(model, virtual, 1)
        call = {"attention_mask": torch.ones_like(start), "max_new_tokens": new, "do_sample": False, **extra}
        assert torch.equal(model.generate(start, **call)[:, held:], ids)


CORE: tuple[Callable[[MethodConfig, str], None], ...] = (
    starts_as_declared,
    is_the_base_when_disabled,
    saves_and_loads,
    folds_or_refuses,
)
FULL = (*CORE, keeps_shapes_and_counts, trains_exactly_its_own, leaves_no_trace, generates_what_the_full_context_says)
