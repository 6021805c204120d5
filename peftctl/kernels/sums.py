"""A weight and a low-rank change, W + s L R, as one operand that is multiplied and not added up.

What experts compute is their architecture's own: which of them a token goes to, how gate and up are joined. With a
`Sum` in the place of their weight the same code multiplies by W and by the two thin matrices in turn. So there is no
second copy of all experts' weights and no gradient of its size, and in half precision a small change is not rounded
away beside a large weight. Whatever else is asked of a `Sum` is asked of the plain sum: as right, and slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNED = 16  # bytes: what the strides of a grouped product's operands must be multiples of


class Sum(Tensor):
    """`weight` (..., m, n) + `scale` * `left` (..., m, r) @ `right` (..., r, n); in the type of the weight."""

    weight: Tensor
    left: Tensor
    right: Tensor
    scale: float

    @staticmethod
    def __new__(cls, weight: Tensor, left: Tensor, right: Tensor, scale: float) -> Sum:
        own: Sum = Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)
        own.weight, own.scale = weight, scale
        own.left, own.right = left.to(weight.dtype), right.to(weight.dtype)
        return own

    def plain(self) -> Tensor:
        """The sum as a tensor of its own."""
        return self.weight + self.left @ self.right * self.scale

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        answer = _SERVED[func](*args, **kwargs) if func in _SERVED else NotImplemented
        if answer is NotImplemented:
            answer = func(*map(_plain, args), **{key: _plain(value) for key, value in kwargs.items()})
        return answer

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} has no gradient of a sum that is not added up")


def _plain(value: Any) -> Any:
    return value.plain() if isinstance(value, Sum) else value


def _transpose(own: Sum, first: int, second: int) -> Any:
    if {first % own.ndim, second % own.ndim} != {own.ndim - 2, own.ndim - 1}:
        return NotImplemented
    return Sum(own.weight.mT, own.right.mT, own.left.mT, own.scale)


def _item(own: Any, index: Any) -> Any:
    """Some of the matrices."""
    if not isinstance(own, Sum) or own.ndim < 3 or not isinstance(index, (int, slice, Tensor)):
        return NotImplemented
    return Sum(own.weight[index], own.left[index], own.right[index], own.scale)


def _linear(x: Tensor, own: Any, bias: Tensor | None = None) -> Any:
    if isinstance(x, Sum) or not isinstance(own, Sum):
        return NotImplemented
    low = F.linear(F.linear(x, own.right), own.left)
    return torch.add(F.linear(x, own.weight, bias), low, alpha=own.scale)


def _matmul(a: Any, b: Any) -> Any:
    if isinstance(a, Sum) and isinstance(b, Sum):
        return NotImplemented
    if isinstance(a, Sum):
        return torch.add(a.weight @ b, a.left @ (a.right @ b), alpha=a.scale)
    return torch.add(a @ b.weight, a @ b.left @ b.right, alpha=b.scale)


def _grouped(x: Tensor, own: Any, *, offs: Tensor | None = None, bias: Any = None, out_dtype: Any = None) -> Any:
    if isinstance(x, Sum) or not isinstance(own, Sum) or bias is not None or out_dtype is not None:
        return NotImplemented
    left, right = _aligned(own.left, own.right)
    low = F.grouped_mm(F.grouped_mm(x, left, offs=offs), right, offs=offs)
    return torch.add(F.grouped_mm(x, own.weight, offs=offs), low, alpha=own.scale)


def _aligned(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The factors with zeros that bring the rank to whole units of alignment."""
    lacking = -left.shape[-1] % (ALIGNED // left.element_size())
    return (F.pad(left, (0, lacking)), F.pad(right, (0, 0, 0, lacking))) if lacking else (left, right)


_FACTS = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")),
        *(getattr(Tensor, name) for name in ("size", "dim", "numel", "element_size", "is_floating_point")),
    }
)
_SERVED: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys((torch.transpose, Tensor.transpose), _transpose),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm), _matmul),
    Tensor.__getitem__: _item,
    F.linear: _linear,
    **dict.fromkeys((F.grouped_mm, torch._grouped_mm), _grouped),
}
