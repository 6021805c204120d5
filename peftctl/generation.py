"""Generating text with a policy: transformers' own decoding, with virtual tokens laid into its cache first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from peftctl.batch import build
from peftctl.errors import ModelError
from peftctl.kernels.stored import wide_copies
from peftctl.methods.attachment import Virtual
from peftctl.policy import Policy, cache_of
from peftctl.row import Row
from peftctl.seq2seq import prefixed, start_of, two_sided
from peftctl.surgery import device_of


@torch.no_grad()
def generate(
    policy: Policy,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    end: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int], None] = lambda token: None,
) -> list[int]:
    """New token ids after a prompt, the end token included; greedy at temperature 0."""
    if policy.task_head is not None:
        raise ModelError(
            f"{type(policy.model).__name__} scores rows and generates no text: measure it with peftctl eval"
        )
    policy.eval()
    torch.manual_seed(seed)
    prompt, extra = _prompt(policy, ids)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}
    sided = two_sided(policy.model)
    begun = 1 if sided else prompt.shape[1]  # a decoder's answer stands behind its first token
    if temperature > 0:
        sampling |= {"do_sample": True, "temperature": temperature, "top_p": top_p}
    with wide_copies(policy.model), prefixed(policy.model, policy.attachment.virtual() if sided else None):
        output = policy.model.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            eos_token_id=list(end) or None,
            pad_token_id=end[0] if end else 0,
            streamer=_Streamer(on_token),
            **sampling,
            **extra,
        )
    new: list[int] = output[0, begun:].tolist()
    return new


@torch.no_grad()
def generate_plainly(policy: Policy, ids: Sequence[int], max_new_tokens: int, end: Sequence[int]) -> list[int]:
    """Greedy decoding that computes the whole row again for each token: the twin that `generate` is tested against."""
    policy.eval()
    new: list[int] = []
    before, source = tuple(ids), 0
    if two_sided(policy.model):
        before, source = (*ids, start_of(policy.model)), len(ids)
    while len(new) < max_new_tokens and not (new and new[-1] in end):
        row = Row((*before, *new), (0.0,) * (len(before) + len(new)), source=source)
        hidden = policy.row_hidden(build([row]).to(device_of(policy.model)))[0]
        new.append(int(policy.head(hidden[-1:]).argmax()))  # type: ignore[misc]
    return new


def _prompt(policy: Policy, ids: Sequence[int]) -> tuple[Tensor, dict[str, Any]]:
    """The prompt, behind as many stand-ins as the cache already holds virtual tokens."""
    device = device_of(policy.model)
    virtual = policy.attachment.virtual()
    if two_sided(policy.model):
        # a cache that grows: one that transformers makes itself has as many layers as T5's encoder
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        extra = {"decoder_start_token_id": start_of(policy.model), _cache_name(policy): cache}
        return torch.tensor([list(ids)], device=device), extra
    if virtual is None:
        return torch.tensor([list(ids)], device=device), {}
    stand_ins = [0] * virtual.length
    return torch.tensor([stand_ins + list(ids)], device=device), {_cache_name(policy): primed(policy, virtual)}


def primed(policy: Policy, virtual: Virtual) -> Any:
    """A cache of one row that holds the virtual tokens."""
    dtype = next(policy.model.parameters()).dtype
    if virtual.embeds is not None:
        return policy.trunk(inputs_embeds=virtual.embeds[None].to(dtype), use_cache=True).past_key_values
    keys, values = (tuple(t.to(dtype) for t in tensors) for tensors in (virtual.keys, virtual.values))
    return cache_of(virtual._replace(keys=keys, values=values), 1)


def _cache_name(policy: Policy) -> str:
    accepted = inspect.signature(policy.model.forward).parameters
    return "cache" if "cache" in accepted else "past_key_values"


class _Streamer:
    """What transformers calls with the prompt first, then with each token."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token = on_token
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        if self.prompt_seen:
            self.on_token(int(value.flatten()[0]))
        self.prompt_seen = True

    def end(self) -> None:
        pass
