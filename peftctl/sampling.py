"""Answers to many prompts at once, several to each: a prompt is run once, and what is drawn depends on given numbers.

`generation.py` is the twin for one prompt, which the greedy answers are tested against.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from peftctl.errors import ModelError
from peftctl.generation import primed
from peftctl.methods.attachment import Virtual
from peftctl.policy import Policy, last_hidden
from peftctl.surgery import device_of

HELD = 1 << 16  # tokens that a cache holds at once


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    max_new_tokens: int,
    end: Sequence[int],
    numbers: Tensor | None = None,
) -> list[list[int]]:
    """`count` answers to each prompt, in order: new token ids, the end token included. Dropout is as the caller set it.

    `numbers`, (prompts * count, max_new_tokens) in [0, 1), draw the tokens by the policy's own probabilities: equal
    numbers give equal answers. Without them, answers are greedy. No other random number is used.
    """
    answers: list[list[int]] = [[] for _ in range(len(prompts) * count)]
    for part in _together(policy, prompts, count, max_new_tokens):
        places = [prompt * count + k for prompt in part for k in range(count)]
        drawn = None if numbers is None else numbers[places]
        chosen = _decoded(policy, [prompts[index] for index in part], count, max_new_tokens, end, drawn)
        for place, answer in zip(places, chosen, strict=True):
            answers[place] = answer
    return answers


def _together(policy: Policy, prompts: Sequence[Sequence[int]], count: int, more: int) -> Iterator[list[int]]:
    """Indices of prompts that are decoded together: neighbours in length, as many as a cache may hold."""
    # padding would lie between virtual tokens and real ones, where a sliding window counts it
    alike = policy.attachment.virtual() is not None
    part: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index])):
        length = len(prompts[index])
        if part and ((alike and length != len(prompts[part[0]])) or (len(part) + 1) * count * (length + more) > HELD):
            yield part
            part = []
        part.append(index)
    if part:
        yield part


def _decoded(
    policy: Policy, prompts: list[Sequence[int]], count: int, most: int, end: Sequence[int], numbers: Tensor | None
) -> list[list[int]]:
    """The answers to some prompts, which are padded on the left, each prompt's `count` one after another."""
    if policy.head is None:
        raise ModelError(f"{type(policy.model).__name__} has no output head that predicts tokens")
    device, virtual = device_of(policy.model), policy.attachment.virtual()
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache = _cache(policy, virtual, len(prompts))
    mask = torch.cat([real.new_ones(len(prompts), cache.get_seq_length()), real], dim=1)
    hidden = _step(policy, ids, mask, cache)
    cache.batch_repeat_interleave(count)
    hidden, mask = (tensor.repeat_interleave(count, dim=0) for tensor in (hidden, mask))
    answers: list[list[int]] = [[] for _ in range(len(prompts) * count)]
    rows = torch.arange(len(answers))
    ends = torch.tensor(list(end), dtype=torch.long, device=device)
    for place in range(most):
        tokens = _choose(policy.head(hidden), None if numbers is None else numbers[rows, place])
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            answers[row].append(token)
        going = (~torch.isin(tokens, ends)).nonzero()[:, 0]
        if not len(going) or place == most - 1:
            break
        if len(going) < len(tokens):
            cache.batch_select_indices(going)
            rows, tokens, mask = rows[going.cpu()], tokens[going], mask[going]
        mask = torch.cat([mask, mask.new_ones(len(tokens), 1)], dim=1)
        hidden = _step(policy, tokens[:, None], mask, cache)
    return answers


def _cache(policy: Policy, virtual: Virtual | None, rows: int) -> Any:
    """An empty cache, or one that holds the virtual tokens once for each row."""
    from transformers import DynamicCache

    if virtual is None:
        return DynamicCache()  # not of the model's config: layers of a sliding window could not be cut by rows
    cache = primed(policy, virtual)
    cache.batch_repeat_interleave(rows)
    return cache


def _step(policy: Policy, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
    """The hidden states, (rows, d), after the last of these ids, which join the cache. `mask`: of all tokens so far."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    output = policy.trunk(
        input_ids=ids,
        attention_mask=mask,
        use_cache=True,
        **{policy.cache_name: cache},
        **policy.positions(positions + policy.layout.first_position),
    )
    return last_hidden(output)[:, -1]


def _choose(logits: Tensor, numbers: Tensor | None) -> Tensor:
    """A token for each row of logits (rows, vocabulary): the likeliest, or the one whose share its number falls in."""
    if numbers is None:
        return logits.argmax(-1)
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    heights = logits.to(exact).softmax(-1).cumsum(-1)
    drawn = numbers.to(heights)[:, None] * heights[:, -1:]
    return torch.searchsorted(heights, drawn, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
