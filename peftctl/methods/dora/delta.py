"""The magnitude m and the direction (W + s B A) / ||W + s B A||. https://arxiv.org/abs/2402.09353"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftctl import surgery
from peftctl.methods._lowrank import targets
from peftctl.methods._products import applied, factors, stored
from peftctl.methods.attachment import Attachment, Delta, Injected
from peftctl.methods.dora import DoraConfig
from peftctl.skeleton import Module

TINY = 1e-24  # least squared norm: a row of zeros stays one


class Decomposed(Delta):
    """Beside a linear whose output i is given by row i of the weight, seen as (out, in); norms are those of rows."""

    squares: Tensor

    def __init__(self, description: Module, module: nn.Module, config: DoraConfig) -> None:
        super().__init__()
        self.description = description
        self.scale, self.dropout = config.scale, config.dropout
        self.a, self.b = factors(description, config.rank)
        own = dict(module.named_parameters(recurse=False))
        # the base's own tensors, looked at and never changed: behind a tuple, so that they are not part of the delta
        self.base = (own["weight"], own.get("bias"))
        self.register_buffer("squares", self._own_squares(), persistent=False)
        # the very norm that it is divided by at first: 1 exactly, so step 0 is the base model
        self.magnitude = nn.Parameter(self._norm(self.squares).clone())

    @property
    def _weight(self) -> Tensor:
        return self.base[0] if self.description.kind == "Linear" else self.base[0].T

    @torch.no_grad()
    def measure(self) -> None:
        self.squares = self._own_squares()

    def _own_squares(self) -> Tensor:
        return self._weight.detach().float().square().sum(1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        bias = self.base[1]
        change = applied(functional.dropout(x, self.dropout, self.training), self.a, self.b)
        ratio = self.magnitude / self._norm(self._changed_squares())
        without_bias = y if bias is None else y - bias  # the bias is not part of the weight, so it is not scaled
        # the difference from 1 is small: taken before it is rounded to the type of y
        return y + (ratio - 1).to(y.dtype) * without_bias + (ratio * self.scale).to(y.dtype) * change

    @torch.no_grad()  # section 4.3: the norm is a constant to the gradient
    def _changed_squares(self) -> Tensor:
        """||W + s B A||^2 of each row, as ||W||^2 + 2 s <W, B A> + s^2 ||B A||^2: nothing of the weight's size."""
        a, b, weight = self.a.float(), self.b.float(), self._weight
        crossed = functional.linear(weight, a.to(weight.dtype)).float()  # (out, rank)
        squared = ((b @ (a @ a.T)) * b).sum(1)
        return self.squares + 2 * self.scale * (crossed * b).sum(1) + self.scale**2 * squared

    @staticmethod
    def _norm(squares: Tensor) -> Tensor:
        return squares.clamp_min(TINY).sqrt()

    def folds(self) -> tuple[str, ...]:
        return ("weight",)

    def fold(self, name: str, weight: Tensor) -> Tensor:
        if name != "weight":
            return weight
        change = stored((self.b.float() @ self.a.float()) * self.scale, self.description, weight)
        moved = weight.float() + change
        rows = self.description.kind == "Linear"
        squares = moved.square().sum(1 if rows else 0)
        ratio = self.magnitude.float().to(weight.device) / self._norm(squares)
        return moved * (ratio[:, None] if rows else ratio)


def attach(model: nn.Module, config: DoraConfig) -> Attachment:
    chosen = targets(surgery.skeleton(model), config, config.rank).modules
    return Attachment([Injected(m.path, Decomposed(m, surgery.find(model, m.path), config)) for m in chosen])
