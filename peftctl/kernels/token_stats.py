"""Log-probabilities of labels from hidden states, in chunks: no (labels x vocabulary) tensor outlives its chunk.

With a frozen head the gradient of every label's log-probability is taken in the forward pass, chunk by chunk, so the
backward pass is one multiplication and the logits are computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peftctl.kernels.matrix import Matrix

Head = Callable[[Tensor], Tensor]  # (n, hidden) -> (n, vocabulary)
# logits held at once, 30 MB of fp32: few chunks stream the head's matrix seldom, but what is larger than 32 MiB costs
# fresh pages each time
CHUNK = 7_500_000


class FrozenHead(NamedTuple):
    """A head in which nothing is trained: its matrix, and what is done to the product (None: nothing).

    `wide`: the matrix in fp32, where the logits of a half-precision head are wanted unrounded.
    """

    matrix: Matrix
    finish: Callable[[Tensor], Tensor] | None = None
    wide: Matrix | None = None

    def product(self, hidden: Tensor) -> Tensor:
        """The logits before the finish, (n, vocabulary)."""
        return self.matrix.forward(hidden) if self.wide is None else self.wide.forward(hidden.float())


def token_stats(
    hidden: Tensor, targets: Tensor, head: Head, vocabulary: int, frozen: FrozenHead | None
) -> tuple[Tensor, Tensor]:
    """Log-probability (fp32) and correctness of each target: `hidden` (L, d), `targets` (L,) -> (L,), (L,).

    Correct is a target that no other token is likelier than. `frozen`: the head once more, if nothing in it is trained.
    """
    chunks = -(-len(targets) // max(1, CHUNK // vocabulary))
    size = max(1, -(-len(targets) // max(1, chunks)))  # of like size
    if frozen is None:
        return plain_token_stats(hidden, targets, head, size)
    logprob, correct = _Frozen.apply(hidden, targets, frozen, size)  # type: ignore[no-untyped-call]
    return logprob, correct


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
    # in fp32 from here on: a log-probability is a small difference of large numbers
    logits = head(hidden).float()
    likeliest = logits.detach().amax(-1) <= logits.detach().gather(1, targets[:, None])[:, 0]
    return -F.cross_entropy(logits, targets, reduction="none"), likeliest


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: FrozenHead, size: int) -> tuple[Tensor, Tensor]:
        logprob, correct = (hidden.new_empty(len(hidden), dtype=kind) for kind in (torch.float32, torch.bool))
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logprob[part], correct[part], slope = _with_slope(hidden[part], targets[part], head, slopes is not None)
            if slopes is not None and slope is not None:
                slopes[part] = slope
        if slopes is not None:
            ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(correct)
        return logprob, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (grads[0][:, None] * slopes).to(slopes.dtype), None, None, None


def _with_slope(
    hidden: Tensor, targets: Tensor, head: FrozenHead, wanted: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probability, correctness, and the log-probability's gradient by the hidden state.

    A label's log-probability depends on its own hidden state alone, so its gradient is head' (one-hot - softmax).
    """
    product = head.product(hidden)
    with torch.set_grad_enabled(wanted and head.finish is not None):
        leaf = product.detach().requires_grad_(torch.is_grad_enabled())
        logits = (leaf if head.finish is None else head.finish(leaf)).float()
    # one buffer from here on, for it is larger than the caches: logits, then their exponentials, then the slope
    chances = logits.detach()
    chances = chances.clone() if chances.data_ptr() == product.data_ptr() else chances
    at = targets[:, None]
    highest, own = chances.amax(-1, keepdim=True), chances.gather(1, at)
    total = chances.sub_(highest).exp_().sum(-1, keepdim=True)
    logprob = (own - highest - total.log())[:, 0]
    correct = (highest <= own)[:, 0]
    if not wanted:
        return logprob, correct, None
    slope = chances.mul_(-1 / total).scatter_add_(1, at, torch.ones_like(own))
    if head.finish is not None:
        (slope,) = torch.autograd.grad(logits, leaf, slope)
    return logprob, correct, head.matrix.backward(slope.to(hidden.dtype))
