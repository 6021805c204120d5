"""Answers to many prompts at once, several to each: a prompt is run once, and what is drawn depends on given numbers.

`generation.py` is the twin for one prompt, which the greedy answers are tested against.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from peftctl.errors import ModelError
from peftctl.generation import primed
from peftctl.kernels.stored import wide_copies
from peftctl.methods.attachment import Virtual
from peftctl.policy import Policy, last_hidden
from peftctl.seq2seq import prefixed, rectangle, start_of, two_sided
from peftctl.surgery import device_of

HELD = 1 << 16  # tokens that a cache holds at once


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    max_new_tokens: int | Sequence[int],
    end: Sequence[int],
    numbers: Tensor | None = None,
) -> list[list[int]]:
    """`count` answers to each prompt, in order: new token ids, the end token included. Dropout is as the caller set it.

    `max_new_tokens`: of all answers, or of those to each prompt. `numbers`, (prompts * count, max_new_tokens) in
    [0, 1), draw the tokens by the policy's own probabilities: equal numbers give equal answers. Without them, answers
    are greedy. No other random number is used. Of an encoder-decoder, prompts are what the encoder reads.
    """
    most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    answers: list[list[int]] = [[] for _ in range(len(prompts) * count)]
    with wide_copies(policy.model):
        for part in _together(policy, prompts, count, max(most, default=0)):
            places = [prompt * count + k for prompt in part for k in range(count)]
            drawn = None if numbers is None else numbers[places]
            limits = [most[prompt] for prompt in part for _ in range(count)]
            chosen = _decoded(policy, [prompts[index] for index in part], count, limits, end, drawn)
            for place, answer in zip(places, chosen, strict=True):
                answers[place] = answer
    return answers


def _together(policy: Policy, prompts: Sequence[Sequence[int]], count: int, more: int) -> Iterator[list[int]]:
    """Indices of prompts that are decoded together: neighbours in length, as many as a cache may hold."""
    # padding would lie between virtual tokens and real ones, where a sliding window counts it
    alike = policy.attachment.virtual() is not None and not two_sided(policy.model)
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
    policy: Policy,
    prompts: list[Sequence[int]],
    count: int,
    limits: Sequence[int],
    end: Sequence[int],
    numbers: Tensor | None,
) -> list[list[int]]:
    """The answers to some prompts, each prompt's `count` one after another; `limits`: the most tokens of each."""
    if policy.head is None:
        raise ModelError(f"{type(policy.model).__name__} has no output head that predicts tokens")
    sided, virtual = two_sided(policy.model), policy.attachment.virtual()
    with prefixed(policy.model, virtual if sided else None):
        read: _Read = _Sides(policy, prompts, count) if sided else _Line(policy, prompts, count, virtual)
        answers: list[list[int]] = [[] for _ in limits]
        rows, hidden = torch.arange(len(limits)), read.hidden
        most, ends = torch.tensor(limits), torch.tensor(list(end), dtype=torch.long, device=hidden.device)
        for place in range(max(limits)):
            tokens = _choose(policy.head(hidden), None if numbers is None else numbers[rows, place])
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
                answers[row].append(token)
            open_ = ~torch.isin(tokens, ends) & (most[rows] > place + 1).to(tokens.device)
            going = open_.nonzero()[:, 0]
            if not len(going):
                break
            if len(going) < len(tokens):
                read.keep(going)
                rows, tokens = rows[going.cpu()], tokens[going]
            hidden = read.further(tokens)
    return answers


class _Read(Protocol):
    """Rows that a model has read and goes on with: `hidden`, (rows, d), is what it answered at the last token."""

    hidden: Tensor

    def keep(self, going: Tensor) -> None:
        """Go on with the rows of these indices alone."""

    def further(self, tokens: Tensor) -> Tensor:
        """One token more of each row, (rows,); the hidden states at it, (rows, d)."""


class _Line:
    """Prompts and answers in one line each, padded on the left."""

    def __init__(self, policy: Policy, prompts: list[Sequence[int]], count: int, virtual: Virtual | None) -> None:
        self.policy = policy
        device, width = device_of(policy.model), max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        self.cache = _cache(policy, virtual, len(prompts))
        self.mask = torch.cat([real.new_ones(len(prompts), self.cache.get_seq_length()), real], dim=1)
        hidden = self._step(ids)
        self.cache.batch_repeat_interleave(count)
        self.hidden, self.mask = (tensor.repeat_interleave(count, dim=0) for tensor in (hidden, self.mask))

    def keep(self, going: Tensor) -> None:
        self.cache.batch_select_indices(going)
        self.mask = self.mask[going]

    def further(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        return self._step(tokens[:, None])

    def _step(self, ids: Tensor) -> Tensor:
        """The hidden states, (rows, d), after the last of these ids, which join the cache."""
        policy = self.policy
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = policy.trunk(
            input_ids=ids,
            attention_mask=self.mask,
            use_cache=True,
            **{policy.cache_name: self.cache},
            **policy.positions(positions + policy.layout.first_position),
        )
        return last_hidden(output)[:, -1]


class _Sides:
    """Prompts that an encoder has read once, and a decoder's answers, which all begin with one token."""

    def __init__(self, policy: Policy, prompts: list[Sequence[int]], count: int) -> None:
        from transformers import DynamicCache, EncoderDecoderCache

        model: Any = policy.model
        ids, real = rectangle(prompts, device_of(model))
        states = model.get_encoder()(input_ids=ids, attention_mask=real.long()).last_hidden_state
        self.states, self.real = (tensor.repeat_interleave(count, dim=0) for tensor in (states, real.long()))
        self.decoder = model.get_decoder()
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.hidden = self.further(ids.new_full((len(self.states),), start_of(model)))

    def keep(self, going: Tensor) -> None:
        self.cache.batch_select_indices(going)
        self.states, self.real = self.states[going], self.real[going]

    def further(self, tokens: Tensor) -> Tensor:
        accepted = inspect.signature(self.decoder.forward).parameters
        output = self.decoder(
            input_ids=tokens[:, None],
            encoder_hidden_states=self.states,
            encoder_attention_mask=self.real,
            use_cache=True,
            **{"cache" if "cache" in accepted else "past_key_values": self.cache},
        )
        return last_hidden(output)[:, -1]


def _cache(policy: Policy, virtual: Virtual | None, rows: int) -> Any:
    """An empty cache, or one that holds the virtual tokens once for each row."""
    from transformers import DynamicCache

    if virtual is None:
        return DynamicCache()  # not of the model's config: layers of a sliding window could not be cut by rows
    cache = primed(policy, virtual)
    cache.batch_repeat_interleave(rows)
    return cache


def _choose(logits: Tensor, numbers: Tensor | None) -> Tensor:
    """A token for each row of logits (rows, vocabulary): the likeliest, or the one whose share its number falls in."""
    if numbers is None:
        return logits.argmax(-1)
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    heights = logits.to(exact).softmax(-1).cumsum(-1)
    drawn = numbers.to(heights)[:, None] * heights[:, -1:]
    return torch.searchsorted(heights, drawn, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
