"""peftctl with one technique taken out: `python -m tests.benchmarks.without TECHNIQUE train RECIPE ...`.

What a recipe can switch off is switched off there (studies.py); these are the parts that have no key of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from peftctl import cli


def _products() -> None:
    """Attention by torch's own kernel, forward and backward."""
    from peftctl.kernels import forest

    forest.applies = lambda q, v: False


def _groups() -> None:
    """Lines of all lengths padded into one rectangle, as far as memory allows."""
    from peftctl.kernels import rectangles

    rectangles.OVERHEAD = 1 << 40


def _slope() -> None:
    """The head's logits computed once more in the backward pass, gradients by autograd."""
    from peftctl import policy
    from peftctl.kernels import token_stats

    def plain(hidden: Any, targets: Any, head: Any, vocabulary: int, frozen: Any, mean: bool = False) -> Any:
        return token_stats.token_stats(hidden, targets, head, vocabulary, None, mean)

    policy.token_stats = plain


def _labels() -> None:
    """The head at every token, as if each had a label."""
    from torch.nn.functional import pad

    from peftctl import policy

    hidden, stats = policy.Policy.hidden, policy.token_stats

    def everywhere(self: Any, batch: Any, first: bool = False) -> Any:
        found, places = hidden(self, batch, first)
        others = torch.ones(len(found), dtype=torch.bool).index_fill_(0, places, False).nonzero()[:, 0]
        return found, torch.cat([places, others])

    def first_of(at: Any, targets: Any, *rest: Any) -> Any:
        return tuple(part[: len(targets)] for part in stats(at, pad(targets, (0, len(at) - len(targets))), *rest))

    policy.Policy.hidden, policy.token_stats = everywhere, first_of


def _chunks() -> None:
    """The head at all labels at once."""
    from peftctl.kernels import token_stats

    token_stats.CHUNK = 1 << 62


def _siblings() -> None:
    """Each linear by itself."""
    from peftctl import fuse

    together = fuse._sharing_input
    fuse._sharing_input = lambda *given: [[one] for group in together(*given) for one in group]


def _mlp() -> None:
    """The MLP's parts by themselves."""
    from peftctl import fuse

    fuse._gated_forward = lambda *given: None


def _norm() -> None:
    """The norms as transformers has them."""
    from peftctl import fuse

    fuse._norm_forward = lambda *given: None


TECHNIQUES: dict[str, Callable[[], None]] = {
    "products": _products,
    "groups": _groups,
    "labels": _labels,
    "chunks": _chunks,
    "slope": _slope,
    "siblings": _siblings,
    "mlp": _mlp,
    "norm": _norm,
}

if __name__ == "__main__":
    TECHNIQUES[sys.argv[1]]()
    cli.main(sys.argv[2:])
