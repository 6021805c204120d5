"""A factor on each number that a linear gives, or is given. https://arxiv.org/abs/2205.05638"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftctl import surgery
from peftctl.methods.attachment import Attachment, Delta, Injected
from peftctl.methods.ia3 import Ia3Config, scaled
from peftctl.skeleton import Module


class Outputs(Delta):
    """scale * y."""

    def __init__(self, module: Module, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))  # one: step 0 is the base model
        self.parts = tuple(module.shapes)
        self.transposed = module.kind == "Conv1D"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (y * self.scale).to(y.dtype)  # in fp32: beside 1, half precision keeps but two digits of a change

    def folds(self) -> tuple[str, ...]:
        return self.parts

    def fold(self, name: str, weight: Tensor) -> Tensor:
        scale = self.scale.float().to(weight.device)
        return weight.float() * (scale[:, None] if name == "weight" and not self.transposed else scale)


class Inputs(Outputs):
    """W (scale * x) + b."""

    on_input = True

    def folds(self) -> tuple[str, ...]:
        return ("weight",)

    def fold(self, name: str, weight: Tensor) -> Tensor:
        if name != "weight":
            return weight
        scale = self.scale.float().to(weight.device)
        return weight.float() * (scale[:, None] if self.transposed else scale)


def attach(model: nn.Module, config: Ia3Config) -> Attachment:
    found = scaled(surgery.skeleton(model), config)
    outputs = [Injected(m.path, Outputs(m, m.out_features)) for m in found.outputs]
    return Attachment([*outputs, *(Injected(m.path, Inputs(m, m.in_features)) for m in found.inputs)])
