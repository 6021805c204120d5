"""A frozen matrix, multiplied by the library that is fastest on its device: as it is stored, widened, or packed."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from peftctl.kernels import onednn, stored
from peftctl.kernels.onednn import linear, linear_onto, packable, packed_linear
from peftctl.kernels.stored import StoredWeight


class Matrix:
    """A frozen weight (out, in), given as it is stored: (in, out) where `transposed`."""

    least_rows = 1  # of x from which a product is worth what it costs beside its arithmetic

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> None:
        self.out_in = weight.T if transposed else weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x (n, in) -> (n, out), the bias added."""
        return linear(x, self.out_in, self.bias)

    def backward(self, slope: Tensor, onto: Tensor | None = None) -> Tensor:
        """The gradient of `forward`'s input, slope (n, out) -> (n, in); added to `onto`, which is used up."""
        return linear(slope, self.out_in.T) if onto is None else linear_onto(slope, self.out_in.T, onto)


class Widened(Matrix):
    """The same for a weight that is stored in a narrower type than it is multiplied in."""

    out_in: StoredWeight
    least_rows = 256

    def forward(self, x: Tensor) -> Tensor:
        return stored.product(x, self.out_in, self.bias)

    def backward(self, slope: Tensor, onto: Tensor | None = None) -> Tensor:
        return stored.product(slope, self.out_in.T, onto=onto)  # type: ignore[arg-type]


class Packed(Matrix):
    """The same, with a copy for the forward pass in oneDNN's own order. The other way it gains nothing."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> None:
        super().__init__(weight, bias, transposed=transposed)
        self._packed = onednn.pack(self.out_in)

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self._packed, self.bias)


def matrix(weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False, pack: bool = False) -> Matrix:
    """The matrix of a weight. `pack`: as a copy in the order in which the device's library multiplies, where it can."""
    if isinstance(weight, StoredWeight):
        return Widened(weight, bias, transposed=transposed)
    kind = Packed if pack and packable(weight) else Matrix
    return kind(weight, bias, transposed=transposed)


def onward(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """A matrix's product alone, x (n, in) -> (n, out): where it is packed, nothing but that copy is kept."""
    if not packable(weight):
        return lambda x: F.linear(x, weight, bias)
    there = onednn.pack(weight)
    return lambda x: packed_linear(x, there, bias)
