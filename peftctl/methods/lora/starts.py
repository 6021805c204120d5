"""What A and B start from, other than noise and zero: parts of the weight that they are to change."""

from __future__ import annotations

import torch
from torch import Tensor

SPARE = 8  # directions beyond the rank, and
ROUNDS = 8  # rounds of refinement, for a decomposition as good as the exact one, in a fraction of its time


def pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """The largest singular values, shared out over both: s B A is the best approximation of W (out, in) by this rank.

    https://arxiv.org/abs/2404.02948, with the fast decomposition of its section 3.
    """
    wide = min(rank + SPARE, *weight.shape)
    left, values, right = torch.svd_lowrank(weight.float(), wide, niter=ROUNDS)
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * right.T[:rank], left[:, :rank] * root


def orthogonal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """The first columns of Q and rows of R of W = Q R. https://arxiv.org/abs/2406.01775"""
    q, r = torch.linalg.qr(weight.float())
    return r[:rank].contiguous(), q[:, :rank].contiguous()


STARTS = {"pissa": pissa, "orthogonal": orthogonal}
