"""Products of a matrix with many rows, by the library that is fastest on the device. The seam to torch's oneDNN calls.

torch keeps these calls for its own compiler and may rename them; where one is missing, torch's plain product serves.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PACKABLE = (torch.float32, torch.bfloat16)
TOKENS = 256  # rows that a packed form is tuned for; any number may come


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (n, in) @ weight (out, in) transposed, the bias added: (n, out).

    In fp32 on the CPU by oneDNN: the library that torch takes by itself is made for one maker's processors, and half as
    fast on others.
    """
    return packed_linear(x, weight, bias) if _serves(weight) else F.linear(x, weight, bias)


def linear_onto(x: Tensor, weight: Tensor, onto: Tensor) -> Tensor:
    """x (n, in) @ weight (out, in) transposed, added to `onto` (n, out), which is used up."""
    if _serves(weight):
        return _linear().binary(x, onto, weight, None, "add")  # type: ignore[no-any-return]
    return onto.addmm_(x, weight.T)


def packable(weight: Tensor) -> bool:
    """Whether this torch has oneDNN's packed product for such a weight, on this processor."""
    return weight.device.type == "cpu" and weight.dtype in PACKABLE and available() and _packs(weight.dtype)


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Seen in a trial: torch refuses bfloat16 on a processor without the instructions, and says so only when asked."""
    weight = torch.zeros(2, 2, dtype=dtype, device="cpu")
    try:
        packed_linear(weight, pack(weight))
    except RuntimeError:
        return False
    return True


def pack(weight: Tensor) -> Any:
    """A copy of a weight (out, in) in oneDNN's own order, for `packed_linear`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), TOKENS)


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `linear`, for a weight as it is or as `pack` gives it."""
    out: Tensor = _linear()(x, weight, bias, "none", [], "")
    return out


@cache
def available() -> bool:
    """Whether this torch has the calls at all."""
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def _serves(weight: Tensor) -> bool:
    return weight.dtype is torch.float32 and packable(weight)


def _linear() -> Any:
    return torch.ops.mkldnn._linear_pointwise
