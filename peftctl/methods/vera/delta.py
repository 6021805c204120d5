"""The change b * B (d * A x), of which b and d are trained. https://arxiv.org/abs/2310.11454"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftctl import surgery
from peftctl.methods._products import stored, stored_rows
from peftctl.methods.attachment import Attachment, Delta, Injected
from peftctl.methods.vera import VeraConfig
from peftctl.skeleton import Module, select


def drawn(rank: int, into: int, out: int, seed: int) -> tuple[Tensor, Tensor]:
    """A (rank, into) and B (out, rank), Kaiming-uniform for rectifiers, A first: as peft draws them from its seed."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.empty(rank, into), torch.empty(out, rank)
    for matrix in (a, b):
        nn.init.kaiming_uniform_(matrix, nonlinearity="relu", generator=generator)
    return a, b


class Projections(Delta):
    """The random matrices, as large as the largest weight needs; a smaller one uses their first columns and rows."""

    inert = True
    a: Tensor
    b: Tensor

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", a)
        self.register_buffer("b", b)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.named_buffers())


class Scaled(Delta):
    """The vectors of one weight."""

    adds = True

    def __init__(self, module: Module, projections: Projections, config: VeraConfig) -> None:
        super().__init__()
        self.module, self.dropout = module, config.dropout
        self.d = nn.Parameter(torch.full((config.rank,), config.d_initial))
        self.b = nn.Parameter(torch.zeros(module.out_features))  # zero: step 0 is the base model
        self.shared = (projections,)  # behind a tuple, so that they are not saved with each delta

    def _projections(self) -> tuple[Tensor, Tensor]:
        (shared,) = self.shared
        return shared.a[:, : self.module.in_features], shared.b[: self.module.out_features]

    # no `product()`: the kernels would take gradients of both matrices where those of two vectors will do
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self._projections()
        inner = functional.linear(functional.dropout(x, self.dropout, self.training), a.to(x.dtype))
        return y + functional.linear(inner * self.d.to(x.dtype), b.to(x.dtype)) * self.b.to(x.dtype)

    def folds(self) -> tuple[str, ...]:
        return ("weight",)

    def fold(self, name: str, weight: Tensor) -> Tensor:
        if name != "weight":
            return weight
        a, b = self._projections()
        change = (self.b.float()[:, None] * b.float()) @ (self.d.float()[:, None] * a.float())
        return weight.float() + stored(change, self.module, weight)

    def fold_rows(self, name: str, weight: Tensor, first: int) -> Tensor | None:
        a, b = self._projections()
        factors = self.d.float()[:, None] * a.float(), self.b.float()[:, None] * b.float()
        return stored_rows(factors, 1.0, self.module, weight, first) if name == "weight" else weight


def attach(model: nn.Module, config: VeraConfig) -> Attachment:
    chosen = select(surgery.skeleton(model), config.target_modules, layers=config.layers).modules
    into, out = max(m.in_features for m in chosen), max(m.out_features for m in chosen)
    shared = Projections(*drawn(config.rank, into, out, config.projection_seed))
    return Attachment([Injected(m.path, Scaled(m, shared, config)) for m in chosen], shared)
