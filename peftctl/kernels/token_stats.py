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

from peftctl.kernels.matrix import Matrix, Packed

Head = Callable[[Tensor], Tensor]  # (n, hidden) -> (n, vocabulary)
# bytes of logits held at once: few chunks stream the head's matrix seldom, but what is larger than 32 MiB costs fresh
# pages each time
CHUNK = 30_000_000
# logits that the CPU goes over at once in fp32: they stay in its caches from the first look to the last
BLOCK = 1 << 19


class FrozenHead(NamedTuple):
    """A head in which nothing is trained: its matrix, and what is done to the product (None: nothing).

    `wide`: the product with the matrix in fp32, where the logits of a half-precision head are wanted unrounded.
    """

    matrix: Matrix
    finish: Callable[[Tensor], Tensor] | None = None
    wide: Callable[[Tensor], Tensor] | None = None

    @property
    def packed(self) -> bool:
        return isinstance(self.matrix, Packed)

    def product(self, hidden: Tensor) -> Tensor:
        """The logits before the finish, (n, vocabulary)."""
        return self.matrix.forward(hidden) if self.wide is None else self.wide(hidden.float())


def token_stats(
    hidden: Tensor, targets: Tensor, head: Head, vocabulary: int, frozen: FrozenHead | None, mean: bool = False
) -> tuple[Tensor, ...]:
    """Log-probability (fp32) and correctness of each target: `hidden` (L, d), `targets` (L,) -> (L,), (L,).

    Correct is a target that no other token is likelier than. `frozen`: the head once more, if nothing in it is trained.
    With `mean` also, (L,), the mean log-probability of all tokens of the vocabulary in the target's place.
    """
    width = 4 if frozen is None or frozen.wide is not None else hidden.element_size()
    chunks = -(-len(targets) // max(1, CHUNK // (vocabulary * width)))
    size = max(1, -(-len(targets) // max(1, chunks)))  # of like size
    if frozen is not None:
        size = max(size, frozen.matrix.least_rows)
    if frozen is None:
        return plain_token_stats(hidden, targets, head, size, mean)
    found: tuple[Tensor, ...] = _Frozen.apply(hidden, targets, frozen, size, mean)  # type: ignore[no-untyped-call]
    return found


def plain_token_stats(hidden: Tensor, targets: Tensor, head: Head, size: int, mean: bool = False) -> tuple[Tensor, ...]:
    """The plain twin: any head, autograd through it, each chunk's logits computed again in the backward pass."""
    if not len(targets):
        kinds = (torch.float32, torch.bool, torch.float32)
        return tuple(hidden.new_zeros(0, dtype=kind) for kind in kinds[: 2 + mean])
    parts = [
        checkpoint(_chunk, h, t, head, mean, use_reentrant=False)
        if torch.is_grad_enabled()
        else _chunk(h, t, head, mean)
        for h, t in zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
    ]
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def _chunk(hidden: Tensor, targets: Tensor, head: Head, mean: bool) -> tuple[Tensor, ...]:
    # in fp32 from here on: a log-probability is a small difference of large numbers
    logits = head(hidden).float()
    likeliest = logits.detach().amax(-1) <= logits.detach().gather(1, targets[:, None])[:, 0]
    stats = -F.cross_entropy(logits, targets, reduction="none"), likeliest
    return (*stats, logits.log_softmax(-1).mean(-1)) if mean else stats


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: FrozenHead, size: int, mean: bool
    ) -> tuple[Tensor, ...]:
        kinds = (torch.float32, torch.bool, torch.float32)[: 2 + mean]
        stats = tuple(hidden.new_empty(len(hidden), dtype=kind) for kind in kinds)
        wanted = ctx.needs_input_grad[0]
        slopes = tuple(torch.empty_like(hidden) for _ in range(1 + mean)) if wanted else ()
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            found, steep = _with_slopes(hidden[part], targets[part], head, wanted, mean)
            for whole, piece in zip((*stats, *slopes), (*found, *steep), strict=True):
                whole[part] = piece
        ctx.save_for_backward(*slopes)
        ctx.mark_non_differentiable(stats[1])
        return stats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slopes = ctx.saved_tensors
        parts = [grad[:, None] * slope for grad, slope in zip(grads[::2], slopes, strict=True)]
        return (sum(parts[1:], start=parts[0]).to(slopes[0].dtype), None, None, None, None)


def _with_slopes(
    hidden: Tensor, targets: Tensor, head: FrozenHead, wanted: bool, mean: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Log-probability, correctness and mean of some labels; and the gradients of the first and the last by the hidden
    state.

    A label's log-probability depends on its own hidden state alone, so its gradient is head' (one-hot - softmax); that
    of the mean is head' (1 / vocabulary - softmax).
    """
    product = head.product(hidden)
    with torch.set_grad_enabled(wanted and head.finish is not None):
        leaf = product.detach().requires_grad_(torch.is_grad_enabled())
        logits = leaf if head.finish is None else head.finish(leaf)
    raw = logits.detach()
    # without a finish nobody asks for the logits again: the first gradient takes their place
    slopes = [raw if head.finish is None and not number else torch.empty_like(raw) for number in range(1 + mean)]
    rows = max(1, BLOCK // raw.shape[1] if raw.device.type == "cpu" else len(raw))
    blocks = zip(*(torch.split(t, rows) for t in (raw, targets[:, None], *slopes)), strict=True)
    stats = tuple(map(torch.cat, zip(*(_block(*block, wanted=wanted) for block in blocks), strict=True)))
    return stats, tuple(_by_hidden(slope, logits, leaf, head, hidden.dtype) for slope in slopes if wanted)


def _block(logits: Tensor, at: Tensor, slope: Tensor, *level: Tensor, wanted: bool) -> tuple[Tensor, ...]:
    """Log-probability, correctness and, where `level` is given, the mean log-probability of a few labels.

    If `wanted` the gradients by the logits are written into `slope` and `level`: of the first and of the mean.
    """
    chances = logits.to(torch.float32, copy=True)  # in place from here on, and small enough for the caches
    highest, own = chances.amax(-1, keepdim=True), chances.gather(1, at)
    middle = [chances.mean(-1, keepdim=True) for _ in level]
    total = chances.sub_(highest).exp_().sum(-1, keepdim=True)
    if wanted:
        slope.copy_(chances.mul_(-1 / total).scatter_add_(1, at, torch.ones_like(own)))
        for flat in level:
            flat.copy_(chances.scatter_add_(1, at, -torch.ones_like(own)).add_(1 / chances.shape[1]))
    logprobs = [value - highest - total.log() for value in (own, *middle)]
    return tuple(stat[:, 0] for stat in (logprobs[0], highest <= own, *logprobs[1:]))


def _by_hidden(slope: Tensor, logits: Tensor, leaf: Tensor, head: FrozenHead, dtype: torch.dtype) -> Tensor:
    """The gradient by the hidden state of what has this one by the logits."""
    if head.finish is not None:
        (slope,) = torch.autograd.grad(logits, leaf, slope, retain_graph=True)
    return head.matrix.backward(slope.to(dtype))
