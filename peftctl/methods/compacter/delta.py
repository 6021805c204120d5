"""A(h) = gelu(h W1 + b1) W2 + b2, each W a sum over i of A_i (x) s_i t_i. https://arxiv.org/abs/2106.04647"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftctl import surgery
from peftctl.errors import Unfoldable
from peftctl.methods._places import Place
from peftctl.methods.attachment import Attachment, Delta, Injected
from peftctl.methods.compacter import CompacterConfig, placed


class Rule(Delta):
    """A: the small matrices that all layers share, (n, n, n)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.rule = nn.Parameter(torch.randn(size, size, size) * size**-0.5)  # n of them are added up

    def fold(self, name: str, weight: Tensor) -> Tensor:
        raise Unfoldable("a bottleneck has a non-linearity inside, which no plain weight can hold")


class Products(nn.Module):
    """One weight: its own factors s, (n, into / n, rank), and t, (n, rank, out / n), and the bias."""

    def __init__(self, into: int, out: int, size: int, rank: int, zero: bool) -> None:
        super().__init__()
        deviation = (2 / (into + out) / rank) ** 0.25  # that the weight has Glorot's variance
        self.s = nn.Parameter(torch.randn(size, into // size, rank) * deviation)
        self.t = nn.Parameter(torch.randn(size, rank, out // size) * (0.0 if zero else deviation))
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, h: Tensor, rule: Tensor) -> Tensor:
        n, rows, columns = len(rule), *(self.s @ self.t).shape[1:]
        weight = torch.einsum("iab,ipq->apbq", rule, self.s @ self.t).reshape(n * rows, n * columns)
        return functional.linear(h, weight.T.to(h.dtype), self.bias.to(h.dtype))


class Compact(Delta):
    """y + A(y); where a block ends in its norm, norm(x + A(norm(x)))."""

    def __init__(self, place: Place, hidden: int, config: CompacterConfig, rule: Rule) -> None:
        super().__init__()
        width = config.width_in(hidden)
        self.reenters = place.normalised
        self.down = Products(hidden, width, config.phm_dim, config.rank, zero=False)
        self.up = Products(width, hidden, config.phm_dim, config.rank, zero=True)  # step 0 is the base model
        self._shared = (rule,)  # in a tuple, so that it is saved and trained once

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        rule = self._shared[0].rule
        small: Tensor = self.up(functional.gelu(self.down(y, rule)), rule)
        return (x if self.reenters else y) + small

    def fold(self, name: str, weight: Tensor) -> Tensor:
        return self._shared[0].fold(name, weight)


def attach(model: nn.Module, config: CompacterConfig) -> Attachment:
    table = surgery.skeleton(model)
    found, rule = placed(table, config), Rule(config.phm_dim)
    hidden = table.dimensions.hidden
    return Attachment([Injected(p.path, Compact(p, hidden, config, rule)) for p in found], shared=rule)
