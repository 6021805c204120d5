"""A frozen matrix, multiplied by the library that is fastest on its device: as it is stored, or packed for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PACKABLE = (torch.float32, torch.bfloat16)
TOKENS = 256  # rows that a packed form is tuned for; any number may come


class Matrix:
    """A frozen weight (out, in), given as it is stored: (in, out) where `transposed`."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> None:
        self.out_in = weight.T if transposed else weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x (n, in) -> (n, out), the bias added."""
        return linear(x, self.out_in, self.bias)

    def backward(self, slope: Tensor, onto: Tensor | None = None) -> Tensor:
        """The gradient of `forward`'s input, slope (n, out) -> (n, in); added to `onto`, which is used up."""
        if onto is None:
            return linear(slope, self.out_in.T)
        if _by_onednn(self.out_in):
            return _linear().binary(slope, onto, self.out_in.T, None, "add")  # type: ignore[no-any-return]
        return onto.addmm_(slope, self.out_in)


class Packed(Matrix):
    """The same, with a copy for the forward pass in oneDNN's own order. The other way it gains nothing."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> None:
        super().__init__(weight, bias, transposed=transposed)
        self._packed = _packed(self.out_in)

    def forward(self, x: Tensor) -> Tensor:
        return _onednn(x, self._packed, self.bias)


def matrix(weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False, pack: bool = False) -> Matrix:
    kind = Packed if pack and packable(weight) else Matrix
    return kind(weight, bias, transposed=transposed)


def onward(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """A matrix's product alone, x (n, in) -> (n, out): where it is packed, nothing but that copy is kept."""
    if not packable(weight):
        return lambda x: F.linear(x, weight, bias)
    there = _packed(weight)
    return lambda x: _onednn(x, there, bias)


def packable(weight: Tensor) -> bool:
    """Whether this torch has oneDNN's packed product for such a weight."""
    return weight.device.type == "cpu" and weight.dtype in PACKABLE and _there_is_one()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (n, in) @ weight (out, in) transposed, the bias added.

    In fp32 on the CPU by oneDNN: the library that torch takes by itself is made for one maker's processors, and half as
    fast on others.
    """
    return _onednn(x, weight, bias) if _by_onednn(weight) else F.linear(x, weight, bias)


def _by_onednn(weight: Tensor) -> bool:
    return weight.dtype is torch.float32 and packable(weight)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = _linear()(x, weight, bias, "none", [], "")
    return out


def _packed(weight: Tensor) -> Any:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), TOKENS)


def _linear() -> Any:
    return torch.ops.mkldnn._linear_pointwise


def _there_is_one() -> bool:
    """torch keeps these products for its own compiler, and may rename them."""
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )
