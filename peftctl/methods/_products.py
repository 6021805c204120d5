"""Low-rank products B A, a (rank, in) and b (out, rank): how they start, what they give, and as a weight's change."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftctl.skeleton import Module


def factors(module: Module, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Factors whose product is zero, so that step 0 is the base model."""
    a = nn.Parameter(torch.empty(rank, module.in_features))
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as in the authors' loralib
    return a, nn.Parameter(torch.zeros(module.out_features, rank))


def applied(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """B A x in the type of x: (..., in) -> (..., out)."""
    return functional.linear(functional.linear(x, a.to(x.dtype)), b.to(x.dtype))


def stored(change: Tensor, module: Module, weight: Tensor) -> Tensor:
    """A change (out, in) as the weight of that module is stored, on the device of that weight."""
    return (change if module.kind == "Linear" else change.T).to(weight.device)
