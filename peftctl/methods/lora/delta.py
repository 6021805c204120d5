"""The low-rank product: y + s B A x. https://arxiv.org/abs/2106.09685"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftctl import surgery
from peftctl.kernels.linear import Product
from peftctl.methods.attachment import Attachment, Delta, Injected
from peftctl.methods.lora import LoraConfig, targets
from peftctl.skeleton import Module


class LowRank(Delta):
    """A product beside a weight that is stored as (out, in), or (in, out) when `transposed`."""

    def __init__(self, module: Module, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, module.in_features))
        self.b = nn.Parameter(torch.zeros(module.out_features, rank))  # zero: step 0 is the base model
        self.scale, self.dropout = scale, dropout
        self.transposed = module.kind != "Linear"
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # as in the authors' loralib

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = functional.dropout(x, self.dropout, self.training)
        inner = functional.linear(x, self.a.to(x.dtype))
        return y + functional.linear(inner, self.b.to(x.dtype)) * self.scale

    def product(self) -> Product | None:
        return Product(self.a, self.b, self.scale, self.dropout)

    def folds(self) -> tuple[str, ...]:
        return ("weight",)

    def fold(self, name: str, weight: Tensor) -> Tensor:
        if name != "weight":
            return weight
        product = (self.b.float() @ self.a.float()) * self.scale
        return weight.float() + (product.T if self.transposed else product).to(weight.device)


class LowRankRows(LowRank):
    """The same beside an embedding, whose input are the numbers of its rows; `gain` is what it scales its rows by."""

    def __init__(self, module: Module, rank: int, scale: float, gain: float) -> None:
        super().__init__(module, rank, scale)
        self.gain = gain
        nn.init.zeros_(self.a)  # as in loralib: a row that was never seen stays at 0
        nn.init.normal_(self.b)

    def product(self) -> None:
        return None  # the input are numbers of rows

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        rows = functional.embedding(x, self.a.T.to(y.dtype))
        return y + functional.linear(rows, self.b.to(y.dtype)) * (self.scale * self.gain)


def attach(model: nn.Module, config: LoraConfig) -> Attachment:
    selection = targets(surgery.skeleton(model), config)
    return Attachment([Injected(m.path, _delta(surgery.find(model, m.path), m, config)) for m in selection.modules])


def _delta(module: nn.Module, description: Module, config: LoraConfig) -> LowRank:
    if description.kind == "Embedding":
        # Gemma multiplies its rows after the lookup
        gain = float(getattr(module, "embed_scale", 1.0))
        return LowRankRows(description, config.rank, config.scale, gain)
    return LowRank(description, config.rank, config.scale, config.dropout)
