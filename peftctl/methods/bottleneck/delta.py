"""The bottleneck itself: A(h) = W2 f(W1 h + b1) + b2. https://arxiv.org/abs/1902.00751"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftctl import surgery
from peftctl.errors import Unfoldable
from peftctl.methods._places import Place, places
from peftctl.methods.attachment import Attachment, Delta, Injected
from peftctl.methods.bottleneck import PRESETS, BottleneckConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "swish": functional.silu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "leakyrelu": functional.leaky_relu,
}


class Bottleneck(Delta):
    """y + A(y), in sequence with what it follows."""

    def __init__(self, hidden: int, width: int, activation: str) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(hidden, width), nn.Linear(width, hidden)
        self.activation = ACTIVATIONS[activation]
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=0.02)  # near the identity: A(h) is small beside h
            nn.init.zeros_(linear.bias)

    def small(self, h: Tensor) -> Tensor:
        """A(h), in the dtype of h."""
        inner = functional.linear(h, self.down.weight.to(h.dtype), self.down.bias.to(h.dtype))
        return functional.linear(self.activation(inner), self.up.weight.to(h.dtype), self.up.bias.to(h.dtype))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.small(y)

    def fold(self, name: str, weight: Tensor) -> Tensor:
        raise Unfoldable("a bottleneck has a non-linearity inside, which no plain weight can hold")


class Renormalised(Bottleneck):
    """norm(x + A(norm(x))): where a block ends in its norm (BERT), A reads after the norm and adds before it."""

    reenters = True

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.small(y)


class Parallel(Bottleneck):
    """y + 4 A(x): beside the MLP, on the residual stream before it. https://arxiv.org/abs/2110.04366"""

    SCALE = 4.0  # section 4.6 of the paper

    def __init__(self, hidden: int, width: int, activation: str) -> None:
        super().__init__(hidden, width, activation)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)  # zero: step 0 is the base model

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.small(x) * self.SCALE


def attach(model: nn.Module, config: BottleneckConfig) -> Attachment:
    table = surgery.skeleton(model)
    hidden = table.dimensions.hidden
    width, activation = config.width_in(hidden), config.activation or PRESETS[config.preset].activation

    def at(place: Place) -> Injected:
        kind = Parallel if place.source else Renormalised if place.normalised else Bottleneck
        return Injected(place.path, kind(hidden, width, activation), place.source)

    return Attachment([at(place) for place in places(table, config.preset)])
