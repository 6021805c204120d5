"""A frozen matrix in the form that its device multiplies fastest: as it is, or packed for oneDNN on the CPU."""

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
        return F.linear(x, self.out_in, self.bias)

    def backward(self, slope: Tensor, onto: Tensor | None = None) -> Tensor:
        """The gradient of `forward`'s input, slope (n, out) -> (n, in); added to `onto`, which is used up."""
        return slope @ self.out_in if onto is None else onto.addmm_(slope, self.out_in)


class Packed(Matrix):
    """The same, with a copy for each direction in oneDNN's own order."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> None:
        super().__init__(weight, bias, transposed=transposed)
        self._there = _packed(self.out_in)
        self._back = _packed(self.out_in.T)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _linear()(x, self._there, self.bias, "none", [], "")
        return out

    def backward(self, slope: Tensor, onto: Tensor | None = None) -> Tensor:
        if onto is None:
            return _linear()(slope, self._back, None, "none", [], "")  # type: ignore[no-any-return]
        return _linear().binary(slope, onto, self._back, None, "add")  # type: ignore[no-any-return]


def matrix(weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False, pack: bool = False) -> Matrix:
    kind = Packed if pack and packable(weight) else Matrix
    return kind(weight, bias, transposed=transposed)


def onward(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """A matrix's product alone, x (n, in) -> (n, out): where it is packed, nothing but that copy is kept."""
    if not packable(weight):
        return lambda x: F.linear(x, weight, bias)
    there = _packed(weight)
    return lambda x: _linear()(x, there, bias, "none", [], "")


def packable(weight: Tensor) -> bool:
    """Whether this torch has oneDNN's packed product for such a weight."""
    return weight.device.type == "cpu" and weight.dtype in PACKABLE and _there_is_one()


def thin(x: Tensor, weight: Tensor) -> Tensor:
    """x (n, in) @ weight (out, in) transposed, where one side is only a rank wide.

    In fp32 on the CPU oneDNN is ahead of the library that torch takes by itself.
    """
    if x.dtype is torch.float32 and packable(weight):
        return _linear()(x.contiguous(), weight.contiguous(), None, "none", [], "")  # type: ignore[no-any-return]
    return F.linear(x, weight)


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
