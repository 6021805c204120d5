"""Putting the fast kernels under a model: linears that receive one tensor are computed together, deltas included.

What belongs together is seen in a trial pass, not read from a list of architectures. The modules stay where they are,
only their `forward` is replaced, so names, keys and bits are those of the plain model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftctl.kernels.linear import Product, linears
from peftctl.kernels.matrix import Packed, matrix
from peftctl.kernels.mlp import gated, slope_of
from peftctl.kernels.norm import rms_norm
from peftctl.methods.attachment import Attachment, Delta
from peftctl.seq2seq import call
from peftctl.skeleton import block_of
from peftctl.surgery import device_of, head_path, kind_of


class Siblings:
    """Frozen linears that receive one tensor. The first that is called computes for all of them."""

    def __init__(self, modules: Sequence[nn.Module], deltas: Sequence[Delta | None], pack: bool) -> None:
        self.matrices = [
            matrix(m.weight.detach(), m.bias, transposed=kind_of(m) == "Conv1D", pack=pack)  # type: ignore[operator,arg-type]
            for m in modules
        ]
        self.deltas = deltas
        self._input: Tensor | None = None
        self._version = -1  # of the input: one that was written to since is another
        self._waiting: dict[int, Tensor] = {}

    def forward_of(self, index: int) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            if self._input is not input or self._version != input._version or index not in self._waiting:
                self._input, self._version = input, input._version
                self._waiting = dict(enumerate(self._compute(input)))
            out = self._waiting.pop(index)
            if not self._waiting:
                self._input = None
            return out

        return forward

    def products(self) -> list[Product | None]:
        return [d.product() if d is not None and d.enabled else None for d in self.deltas]

    @property
    def training(self) -> bool:
        return any(d.training for d in self.deltas if d is not None)

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        return linears(x, self.matrices, self.products(), self.training)


Places = dict[nn.Module, tuple[Siblings, int]]  # where each linear is computed


def fuse(model: Any, attachment: Attachment, *, pack: bool) -> bool:
    """Compute the trunk's frozen linears, gated MLPs and norms by the fast kernels, until the attachment is removed.

    `pack`: keep copies of the matrices in the device's own order, where it has one. Returns whether there are any.
    """
    by_path: dict[str, list[int]] = {}
    for index, path in enumerate(attachment.paths):
        by_path.setdefault(path, []).append(index)
    places: Places = {}
    for group in _sharing_input(model, attachment):
        deltas = [_product_at(attachment, by_path.get(path, [])) for path, _ in group]
        siblings = Siblings([module for _, module in group], deltas, pack)
        for place, ((path, module), delta) in enumerate(zip(group, deltas, strict=True)):
            if delta is not None:
                attachment.release(by_path[path][0])
            places[module] = (siblings, place)
    replaced = {module: siblings.forward_of(place) for module, (siblings, place) in places.items()}
    with attachment.disabled():
        replacing = _replaced(model, attachment)
        for module in (m for m in model.modules() if m not in replacing):
            forward = _gated_forward(module, places) or _norm_forward(module)
            if forward is not None:
                replaced[module] = forward
    for module, forward in replaced.items():
        module.forward = forward
    attachment.at_removal(lambda: _restore(replaced))
    return any(isinstance(one, Packed) for siblings, _ in places.values() for one in siblings.matrices)


def _replaced(model: nn.Module, attachment: Attachment) -> set[nn.Module]:
    """The modules that run with parameters other than their own."""
    return {model.get_submodule(place.path) for place in attachment.places if place.delta.stands_in}


def _gated_forward(module: nn.Module, places: Places) -> Callable[[Tensor], Tensor] | None:
    """The forward of a gated MLP, None for another module. What it is made of tells, and that it computes as one."""
    linear = [child for child in module.children() if child in places]
    others = [child for child in module.children() if child not in places]
    if len(linear) != 3 or len(others) > 1 or any(_watched(child) for child in module.children()):
        return None
    if any(list(child.parameters()) for child in others):
        return None
    activation = others[0] if others else getattr(module, "act_fn", None)
    (pair, _), (same, _), (last, _) = (places[child] for child in linear)
    if not callable(activation) or pair is not same or len(pair.deltas) != 2 or len(last.deltas) != 1:
        return None
    for order in ((0, 1), (1, 0)):
        forward = _gated(pair, last, order, activation)
        if _alike(module, forward, linear[0].in_features):  # type: ignore[arg-type]
            return forward
    return None


def _gated(
    pair: Siblings, last: Siblings, order: tuple[int, int], activation: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    slope = slope_of(activation)

    def forward(x: Tensor) -> Tensor:
        matrices = [*(pair.matrices[i] for i in order), *last.matrices]
        products = pair.products()
        both = [*(products[i] for i in order), *last.products()]
        return gated(x, matrices, both, activation, slope, pair.training or last.training)

    return forward


def _norm_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The forward of a root-mean-square norm, None for another module."""
    eps, weight = getattr(module, "variance_epsilon", getattr(module, "eps", None)), getattr(module, "weight", None)
    if kind_of(module) != "Norm" or not isinstance(eps, float) or not isinstance(weight, nn.Parameter):
        return None
    if weight.ndim != 1 or weight.requires_grad or len(list(module.parameters(recurse=False))) != 1:
        return None

    def forward(hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, weight, eps)

    return forward if _alike(module, forward, len(weight)) else None


@torch.no_grad()
def _alike(module: nn.Module, forward: Callable[[Tensor], Tensor], width: int) -> bool:
    """Whether a function gives what the module gives, on random input. Deltas are off meanwhile."""
    like = next(module.parameters())
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(0)).to(like)[None]
    try:
        ours, theirs = forward(x).float(), module.forward(x).float()
    except (RuntimeError, TypeError, ValueError):
        return False
    near = 1e-4 if like.dtype is torch.float32 else 2e-2
    return ours.shape == theirs.shape and bool((ours - theirs).norm() <= near * theirs.norm())


def _watched(module: nn.Module) -> bool:
    """Whether something hangs on a module, which would miss a call that is not made."""
    return any(len(getattr(module, f"_{kind}hooks")) for kind in ("forward_pre_", "forward_", "backward_"))


def _restore(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        del module.forward


def _product_at(attachment: Attachment, indices: Sequence[int]) -> Delta | None:
    """The first delta at a place if it is a low-rank product; others go on by their hooks, after it."""
    if not indices or attachment.sources[indices[0]] is not None:
        return None
    delta: Delta = attachment.deltas[indices[0]]  # type: ignore[assignment]
    return delta if delta.product() is not None else None


@torch.no_grad()
def _sharing_input(model: Any, attachment: Attachment) -> list[list[tuple[str, nn.Module]]]:
    """The frozen linears of the trunk that a pass calls once, those that receive the same tensor together."""
    seen: list[tuple[str, nn.Module, Tensor]] = []
    handles = []
    trunk, replaced, head = model.base_model, _replaced(model, attachment), head_path(model)
    for path, module in model.named_modules():
        if module not in replaced and path != head and _plain_linear(module):
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, kwargs, path=path: seen.append((path, m, args[0] if args else kwargs["input"])),
                    with_kwargs=True,
                )
            )
    training = model.training
    model.eval()
    try:
        with attachment.disabled():
            trunk(**call(model, torch.arange(1, 6, device=device_of(model))[None]))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    calls = [id(module) for _, module, _ in seen]
    groups: dict[tuple[int, str], list[tuple[str, nn.Module]]] = {}
    for path, module, x in seen:  # `seen` keeps every input alive, so no two share an address
        if calls.count(id(module)) == 1:
            # a decoder's blocks all read the encoder's answer, but each must be able to be recomputed by itself
            groups.setdefault((id(x), block_of(path)), []).append((path, module))
    return list(groups.values())


def _plain_linear(module: nn.Module) -> bool:
    """A frozen linear as torch or transformers define it, not a subclass with a forward of its own."""
    kind = kind_of(module)
    own = nn.Linear.forward if kind == "Linear" else None
    usual = type(module).forward is own or (kind == "Conv1D" and type(module).__name__ == "Conv1D")
    if not usual or "forward" in vars(module):
        return False
    return all(p.is_floating_point() and not p.requires_grad for p in module.parameters())
