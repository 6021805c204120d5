"""peftctl with one technique taken out: `python -m tests.benchmarks.without TECHNIQUE train RECIPE ...`.

What a recipe can switch off is switched off there (studies.py); these are the parts that have no key of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

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
    "slope": _slope,
    "siblings": _siblings,
    "mlp": _mlp,
    "norm": _norm,
}

if __name__ == "__main__":
    TECHNIQUES[sys.argv[1]]()
    cli.main(sys.argv[2:])
