"""A frozen weight that is stored in a narrow type and multiplied in a wider one.

A base stored in bfloat16 stays at two bytes a weight, while everything computed with it is float32: processors without
instructions for bfloat16 multiply it up to several hundred times slower. A matrix is widened into one scratch buffer
when a product needs it, in the forward pass and again in the backward pass, so no wide copy outlives its product.

A `StoredWeight` takes the place of a module's parameter. Products and look-ups are served here, whichever function of
torch the architecture calls; any other operation gets a widened copy of its own, so it is right, and only slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftctl.kernels import onednn
from peftctl.kernels import scratch as buffers
from peftctl.kernels.scratch import blocks, operands, scratch
from peftctl.memory import available_bytes

FEW = 16  # rows below which oneDNN takes longer to find its kernel than torch's plain product takes in all


class StoredWeight(Tensor):
    """`stored`, a frozen floating-point tensor, seen as one of the wider type `dtype`, in which it is multiplied."""

    stored: Tensor
    wide: torch.dtype  # that of `dtype`, which takes longer to ask for

    @staticmethod
    def __new__(cls, stored: Tensor, dtype: torch.dtype) -> StoredWeight:
        weight: StoredWeight = Tensor._make_wrapper_subclass(
            cls, stored.shape, strides=stored.stride(), dtype=dtype, device=stored.device
        )
        weight.stored, weight.wide = stored.detach(), dtype
        return weight

    def widen(self) -> Tensor:
        """A plain tensor of the wide type, of its own."""
        return self.stored.to(self.dtype)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"StoredWeight({tuple(self.shape)}, {self.stored.dtype} multiplied in {self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        served = _SERVED.get(func)
        answer = served(*args, **kwargs) if served is not None else NotImplemented
        if answer is NotImplemented:
            answer = func(*map(_wide, args), **{key: _wide(value) for key, value in kwargs.items()})
        return answer

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """What reaches torch below its Python functions, such as an operation inside another autograd function."""
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return StoredWeight(args[0].stored, args[0].dtype)
        return func(*map(_wide, args), **{key: _wide(value) for key, value in (kwargs or {}).items()})


def _wide(value: Any) -> Any:
    if isinstance(value, StoredWeight):
        return value.widen()
    return type(value)(map(_wide, value)) if type(value) in (tuple, list) else value


def product(x: Tensor, weight: StoredWeight, bias: Tensor | None = None, *, onto: Tensor | None = None) -> Tensor:
    """x (n, in) @ weight (out, in) transposed, the bias added: (n, out). With `onto` added to that, which is used up.

    No gradient: see `linear`. A matrix above `scratch.BLOCK` is widened a block of its stored rows at a time.
    """
    inner, dtype = weight.stored, weight.wide
    if inner.numel() <= buffers.BLOCK:
        return _multiply(x, _widened(inner, dtype), bias, onto)
    if inner.is_contiguous():  # each block gives some columns of the result
        out = x.new_empty(len(x), len(inner))
        for rows in blocks(inner):
            part = _multiply(x, scratch.widen(inner[rows], dtype), None if bias is None else bias[rows], None)
            out[:, rows] = part
        return out if onto is None else onto.add_(out)
    rows_of_in = inner.T.contiguous()  # no copy for a matrix that is stored so; each block gives a part of every sum
    for rows in blocks(rows_of_in):
        onto = _multiply(x[:, rows], scratch.widen(rows_of_in[rows], dtype).T, None, onto)
    return onto if bias is None else onto + bias  # type: ignore[return-value,operator]


def linear(x: Tensor, weight: StoredWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., in) -> (..., out) with its gradient by x, for a weight (out, in)."""
    flat = x.reshape(-1, x.shape[-1])
    learning = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    out: Tensor = _Linear.apply(flat, weight, bias) if learning else product(flat, weight, bias)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], out.shape[-1])


def multiply_in(model: nn.Module, dtype: torch.dtype, keep: Sequence[str] = ()) -> nn.Module:
    """The frozen model, changed so that everything is computed in `dtype`, but the modules at the paths in `keep`.

    Matrices stored in a narrower type stay as they are and are widened for each product; vectors are widened for good.
    What is stored in a wider type is narrowed for good: it would be for each product. Tied parameters stay tied.
    """
    done: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        if f"{path}.".startswith(tuple(f"{kept}." for kept in keep)):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point() and parameter.dtype is not dtype:
                if id(parameter) not in done:
                    done[id(parameter)] = nn.Parameter(_stored(parameter.detach(), dtype), requires_grad=False)
                module._parameters[name] = done[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and buffer.dtype.itemsize < dtype.itemsize:
                module._buffers[name] = buffer.to(dtype)
    return model


@contextmanager
def wide_copies(model: nn.Module) -> Iterator[bool]:
    """Within it, all that products need is widened once, where half of the free memory holds it. Whether it does.

    For text that is generated a token at a time: a matrix is read once for each token, and to widen it costs more than
    to multiply it. The products have the same operands, so they give the same bits.
    """
    weights = list(_multiplied(model))
    size = sum(weight.numel() * weight.dtype.itemsize for weight in weights)
    free = available_bytes()
    if not weights or free is None or size > free // 2 or scratch.copies:
        yield bool(scratch.copies)
        return
    for weight in weights:
        wide = weight.widen()
        for narrow, part in zip(operands(weight.stored), operands(wide), strict=True):
            scratch.copies[narrow.data_ptr(), narrow.shape, weight.dtype] = part
    try:
        yield True
    finally:
        scratch.copies.clear()


def _multiplied(model: nn.Module) -> Iterator[StoredWeight]:
    """The stored weights but those that are only looked up in."""
    modules = (module for module in model.modules() if not isinstance(module, nn.Embedding))
    weights: dict[Any, None] = dict.fromkeys(weight for module in modules for weight in module._parameters.values())
    return (weight for weight in weights if isinstance(weight, StoredWeight) and weight.stored.is_contiguous())


def stored_type(model: nn.Module) -> torch.dtype:
    """The type that a model's matrices are stored in: that of the largest number of its elements."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            kind = parameter.stored.dtype if isinstance(parameter, StoredWeight) else parameter.dtype
            sizes[kind] = sizes.get(kind, 0) + parameter.numel()
    return max(sizes, key=lambda kind: sizes[kind])


def computed_type(model: nn.Module) -> torch.dtype:
    """The type that a model's matrices are multiplied in."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _stored(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    narrower = parameter.dtype.itemsize < dtype.itemsize
    return StoredWeight(parameter, dtype) if narrower and parameter.ndim > 1 else parameter.to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx = product(grads[0], ctx.weight.T) if ctx.needs_input_grad[0] else None
        return dx, None, grads[0].sum(0) if ctx.needs_input_grad[2] else None


def _widened(inner: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix in the scratch, in the order in which it is stored, which makes the copy a straight one."""
    return scratch.widen(inner, dtype) if inner.is_contiguous() else scratch.widen(inner.T.contiguous(), dtype).T


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, onto: Tensor | None) -> Tensor:
    if onto is None and len(x) < FEW:
        return F.linear(x, weight, bias)
    return onednn.linear(x, weight, bias) if onto is None else onednn.linear_onto(x, weight, onto)


def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if isinstance(x, StoredWeight) or not isinstance(weight, StoredWeight) or weight.stored.ndim != 2:
        return NotImplemented
    return linear(x, weight, bias) if x.dtype is weight.wide else NotImplemented


def _addmm(bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1, out: Any = None) -> Any:
    if beta != 1 or alpha != 1 or out is not None or isinstance(bias, StoredWeight) or bias.ndim != 1:
        return NotImplemented
    return _matmul(x, weight) + bias


def _matmul(a: Any, b: Any) -> Any:
    if isinstance(a, StoredWeight) or not isinstance(b, StoredWeight):
        return NotImplemented
    if b.ndim == 2 and a.ndim >= 2:
        return _linear(a, b.T)
    if b.ndim == a.ndim == 3 and len(a) == len(b):  # a matrix each
        return torch.stack([linear(part, StoredWeight(b.stored[index].T, b.dtype)) for index, part in enumerate(a)])
    return NotImplemented


def _grouped(x: Any, weight: Any, *, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Some rows of x (n, in) by each of the matrices (count, in, out): `offs` (count,) are the ends of their rows."""
    if not isinstance(weight, StoredWeight) or weight.ndim != 3 or isinstance(x, StoredWeight) or offs is None:
        return NotImplemented
    if x.ndim != 2 or bias is not None or out_dtype is not None:
        return NotImplemented
    ends = offs.tolist()
    parts = zip([0, *ends], ends, range(len(ends)), strict=False)
    rows = [
        linear(x[start:end], StoredWeight(weight.stored[index].T, weight.dtype))
        for start, end, index in parts
        if end > start
    ]
    rest = x.new_zeros(len(x) - ends[-1], weight.shape[2])
    return torch.cat([*rows, rest])


def _embedding(ids: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *others: Any, **more: Any) -> Any:
    if not isinstance(weight, StoredWeight) or max_norm is not None:
        return NotImplemented
    return F.embedding(ids, weight.stored, padding_idx).to(weight.dtype)


def _viewed(view: Callable[..., Any]) -> Callable[..., Any]:
    """A view of the stored values: the same elements, still narrow."""

    def apply(weight: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(weight, StoredWeight) or any(isinstance(value, StoredWeight) for value in args):
            return NotImplemented
        return StoredWeight(view(weight.stored, *args, **kwargs), weight.dtype)

    return apply


_FACTS = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")),
        *(getattr(Tensor, name).__get__ for name in ("is_leaf", "grad", "grad_fn", "is_meta", "layout", "_version")),
        *(getattr(Tensor, name) for name in ("size", "dim", "numel", "element_size", "is_floating_point", "__len__")),
        *(getattr(Tensor, name) for name in ("requires_grad_", "is_contiguous", "stride", "is_complex")),
    }
)
_SERVED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _matmul),
    **dict.fromkeys((torch.bmm, Tensor.bmm), _matmul),
    **dict.fromkeys((F.grouped_mm, torch._grouped_mm), _grouped),
    **{view: _viewed(view) for view in (torch.transpose, Tensor.transpose, Tensor.t, torch.t, Tensor.permute)},
    **{view: _viewed(view) for view in (Tensor.__getitem__, Tensor.view, Tensor.reshape, Tensor.narrow)},
    **{view: _viewed(view) for view in (Tensor.unsqueeze, Tensor.squeeze, Tensor.contiguous, Tensor.detach)},
    **{getattr(Tensor, name).__get__: _viewed(getattr(Tensor, name).__get__) for name in ("T", "mT", "data")},
}
