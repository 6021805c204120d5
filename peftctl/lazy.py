"""Parameters that stay in their files: a model on the meta device whose weights are read by the very call that asks.

While a `Reading` is active, every function of torch that is given such a parameter gets its values in fp32 instead: of
a lookup the rows that are asked for, of a product with a matrix one block of rows after the other, of anything else the
whole parameter, which is dropped when the call is over. So a forward of the plain model takes the memory of its largest
block of numbers, wherever its code reads its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from peftctl.errors import PeftctlError
from peftctl.file_weights import FileWeight


class Unreadable(PeftctlError):
    """A parameter was asked for that no file holds, or in a way that cannot be followed."""


class Reading(TorchFunctionMode):
    """`sources`: what the files hold, for each parameter of the model that is on the meta device."""

    def __init__(self, sources: Mapping[nn.Parameter, FileWeight]) -> None:
        super().__init__()
        self.sources = {id(parameter): source for parameter, source in sources.items()}
        self._owner = ""  # the module of experts whose parameters are held, as its code asks for them one by one
        self._held: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for kind in types:
            if kind not in (Tensor, nn.Parameter):  # an operand that answers itself, and may hold a parameter
                with nullcontext() if func in _FACTS else self:
                    return kind.__torch_function__(func, types, tuple(args), kwargs)  # type: ignore[attr-defined]
        if args and self._lazy(args[0]) and func in _FACTS:
            return torch.device("cpu") if func == _DEVICE else func(*args, **kwargs)
        if func in _SERVED and (answer := _SERVED[func](self, *args, **kwargs)) is not NotImplemented:
            return answer
        return func(*map(self._real, args), **{key: self._real(value) for key, value in kwargs.items()})

    def _lazy(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_meta

    def source(self, value: Any) -> FileWeight | None:
        """What the files hold of a parameter; None of what has values. Raises Unreadable.

        Without values there must be nothing else: a product with such a thing is a number, and no error.
        """
        if not self._lazy(value):
            return None
        if id(value) not in self.sources:
            raise Unreadable(f"what has a shape, {tuple(value.shape)}, and no values is no parameter of a file")
        return self.sources[id(value)]

    def _real(self, value: Any) -> Any:
        """The same argument with values in the place of parameters."""
        if isinstance(value, (list, tuple)) and any(map(self._lazy, value)):
            return [self._real(one) for one in value]
        source = self.source(value)
        if source is None:
            return value
        return self._of_experts(value, source) if value.ndim > 2 else source.read()

    def _of_experts(self, value: nn.Parameter, source: FileWeight) -> Tensor:
        if source.owner != self._owner:
            self._owner, self._held = source.owner, {}
        if id(value) not in self._held:
            self._held[id(value)] = source.read()
        return self._held[id(value)]


def _looked_up(reading: Reading, ids: Any, weight: Any, **settings: Any) -> Any:
    """Some rows. What else a lookup may be told is about gradients, but for a largest norm."""
    source = reading.source(weight)
    if source is None or settings.get("max_norm") is not None:
        return NotImplemented
    wanted, places = ids.unique(return_inverse=True)
    if len(wanted) and not 0 <= int(wanted[0]) <= int(wanted[-1]) < weight.shape[0]:
        raise IndexError(f"index {int(wanted[-1])} is outside an embedding of {weight.shape[0]} rows")
    return F.embedding(places, source.rows(wanted.tolist()))


def _product(reading: Reading, x: Any, weight: Any, bias: Any = None) -> Any:
    """x W^T + b, a block of rows of W at a time."""
    source = reading.source(weight)
    if source is None or weight.ndim != 2 or x.dtype is not torch.float32 or reading.source(x) is not None:
        return NotImplemented
    flat, found = x.reshape(-1, x.shape[-1]), x.new_empty(weight.shape[0], x[..., 0].numel())
    for first, block in source.blocks():
        torch.mm(block, flat.T, out=found[first : first + len(block)])
    answer = found.T.reshape(*x.shape[:-1], weight.shape[0])
    own = reading._real(bias)
    return answer if own is None else answer.add_(own)


def _item(reading: Reading, value: Any, index: Any) -> Any:
    """A slice of rows."""
    source = reading.source(value)
    if source is None or not isinstance(index, slice) or value.ndim > 2:
        return NotImplemented
    return source.rows(list(range(*index.indices(value.shape[0]))))


_DEVICE = Tensor.device.__get__
_ATTRIBUTES: tuple[str, ...] = (
    "shape",
    "dtype",
    "device",
    "ndim",
    "layout",
    "itemsize",
    "nbytes",
    "requires_grad",
    "grad",
    "is_leaf",
)
_ATTRIBUTES += ("is_cuda", "is_cpu", "is_mps", "is_meta", "is_sparse", "is_quantized")
_METHODS = ("size", "dim", "numel", "nelement", "element_size", "stride", "is_contiguous", "is_complex", "__len__")
_FACTS = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
        *(getattr(Tensor, name) for name in _METHODS),
        *(Tensor.is_floating_point, torch.is_floating_point, torch.numel),
    }
)
_SERVED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.embedding: _looked_up,
    F.linear: _product,
    Tensor.__getitem__: _item,
}
