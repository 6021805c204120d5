"""A change of a bias, at the output that it is added to. https://arxiv.org/abs/2106.10199"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftctl import surgery
from peftctl.errors import Unfoldable
from peftctl.methods.attachment import Attachment, Delta, Injected
from peftctl.methods.bitfit import BitfitConfig
from peftctl.methods.bitfit.places import places, width


class Bias(Delta):
    adds = True

    def __init__(self, size: int, present: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))  # zero: step 0 is the base model
        self.present = present

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.bias.to(y.dtype)

    def folds(self) -> tuple[str, ...]:
        return ("bias",)

    def fold(self, name: str, weight: Tensor) -> Tensor:
        if not self.present:
            raise Unfoldable("the architecture has no bias there, so a bias that was added cannot be merged into it")
        return weight.float() + self.bias.float().to(weight.device) if name == "bias" else weight


def attach(model: nn.Module, config: BitfitConfig) -> Attachment:
    modules = places(surgery.skeleton(model), config.biases, config.add_missing)
    return Attachment([Injected(m.path, Bias(width(m), "bias" in m.shapes)) for m in modules])
