"""Low-rank products B A: how they start, what they give, and as a weight's change.

a is (rank, in) and b (out, rank); of experts, all theirs at once, (experts, rank, in) and (experts, out, rank).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftctl.skeleton import Module


def factors(module: Module, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Factors whose product is zero, so that step 0 is the base model."""
    several = module.shapes["weight"][:-2]  # of experts, one product each
    a = nn.Parameter(torch.empty(*several, rank, module.in_features))
    for own in a.view(-1, rank, module.in_features):
        nn.init.kaiming_uniform_(own, a=math.sqrt(5))  # as in the authors' loralib
    return a, nn.Parameter(torch.zeros(*several, module.out_features, rank))


def applied(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """B A x in the type of x: (..., in) -> (..., out)."""
    return functional.linear(functional.linear(x, a.to(x.dtype)), b.to(x.dtype))


def stored(change: Tensor, module: Module, weight: Tensor) -> Tensor:
    """A change (out, in) as the weight of that module is stored, on the device of that weight."""
    return (change if module.kind == "Linear" else change.T).to(weight.device)


def stored_rows(
    factors: tuple[Tensor, Tensor], scale: float, module: Module, weight: Tensor, first: int
) -> Tensor | None:
    """Rows of a weight from `first` on with the product inside, in fp32; None where it is not stored as (out, in)."""
    if module.kind != "Linear":
        return None
    a, b = factors
    change = b[first : first + len(weight)].float() @ a.float()
    return change.mul_(scale).to(weight.device).add_(weight.float())  # in place, as a merge does it all the time
