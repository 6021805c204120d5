"""Log-probabilities of labels from hidden states, in chunks: no (labels x vocabulary) tensor outlives its chunk.

With a frozen head the gradient of every label's log-probability is taken in the forward pass, chunk by chunk, so the
backward pass is one multiplication and the logits are computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]  # (n, hidden) -> (n, vocabulary)
CHUNK = 1 << 24  # logits held at once; 64 MiB of fp32


def token_stats(hidden: Tensor, targets: Tensor, head: Head, vocabulary: int, frozen: bool) -> tuple[Tensor, Tensor]:
    """Log-probability (fp32) and correctness of each target: `hidden` (L, d), `targets` (L,) -> (L,), (L,).

    `frozen`: whether nothing inside the head is trained.
    """
    size = max(1, CHUNK // vocabulary)
    if frozen and torch.is_grad_enabled() and hidden.requires_grad:
        logprob, correct = _Frozen.apply(hidden, targets, head, size)  # type: ignore[no-untyped-call]
        return logprob, correct
    return plain_token_stats(hidden, targets, head, size)


def plain_token_stats(hidden: Tensor, targets: Tensor, head: Head, size: int) -> tuple[Tensor, Tensor]:
    """The plain twin: any head, autograd through it, each chunk's logits computed again in the backward pass."""
    if not len(targets):
        return hidden.new_zeros(0, dtype=torch.float32), hidden.new_zeros(0, dtype=torch.bool)
    parts = [
        checkpoint(_chunk, h, t, head, use_reentrant=False) if torch.is_grad_enabled() else _chunk(h, t, head)
        for h, t in zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
    ]
    logprobs, corrects = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(corrects)


def _chunk(hidden: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    logits = head(hidden)
    # in fp32 from here on: a log-probability is a small difference of large numbers
    logprob = -F.cross_entropy(logits.float(), targets, reduction="none")
    return logprob, logits.detach().argmax(-1) == targets


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, size: int) -> tuple[Tensor, Tensor]:
        logprobs, corrects, slopes = [], [], []
        for h, t in zip(torch.split(hidden, size), torch.split(targets, size), strict=True):
            with torch.enable_grad():
                leaf = h.detach().requires_grad_()
                logprob, correct = _chunk(leaf, t, head)
                # a label's log-probability depends on its own hidden state alone: the sum's gradient is every one's
                (slope,) = torch.autograd.grad(logprob.sum(), leaf)
            logprobs.append(logprob.detach())
            corrects.append(correct)
            slopes.append(slope)
        ctx.save_for_backward(torch.cat(slopes))
        correct = torch.cat(corrects)
        ctx.mark_non_differentiable(correct)
        return torch.cat(logprobs), correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (grads[0][:, None] * slopes).to(slopes.dtype), None, None, None
