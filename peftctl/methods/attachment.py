"""What a method puts into a base: deltas at dotted paths, hung on the modules by hooks.

The base's modules, names and bits stay as they are: a hook hands each module's output (or input) to the deltas at its
path, or lets their tensors stand in for its parameters while it runs; with a delta disabled the module is the base's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftctl.errors import FormatError, Unfoldable, several
from peftctl.kernels.linear import Product
from peftctl.skeleton import dotted


class Delta(nn.Module):
    """A trainable change at one place. Tensors and parameters are its own; it never holds a module of the base."""

    enabled = True
    reenters = False  # the answer of `forward` is a new input, on which the module runs once more (its output counts)
    on_input = False  # `forward` is asked before the module runs, with its input as `x` and `y`; the answer is run on
    inert = False  # it only holds what other deltas use, and changes nothing by itself
    adds = False  # what it adds to a parameter does not depend on the parameter: several such changes add up
    stands_in = False  # there is no `forward`: the module runs with `stand_ins` in the place of its own parameters

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is saved, by a name relative to the delta."""
        return dict(self.named_parameters())

    def written(self) -> dict[str, Tensor]:
        """The same as an adapter's file holds it."""
        return self.tensors()

    def trainable(self) -> dict[str, nn.Parameter]:
        """What is trained; a subset of `tensors`."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The changed output, from the module's first input `x` and its output `y`; the shape of `y` is kept."""
        raise NotImplementedError

    def measure(self) -> None:
        """Take anew what it keeps of the base's values: they came after it was made."""

    def stand_ins(self, module: nn.Module) -> dict[str, Tensor]:
        """Values for the module's parameters in `folds`, where `stands_in`. The dtype need not be theirs."""
        return {}

    def product(self) -> Product | None:
        """The change as a low-rank product of the module's input, where it is one: what the fast kernels serve."""
        return None

    def fold(self, name: str, weight: Tensor) -> Tensor:
        """The parameter `name` of the module at this delta's path, as stored, with the change inside; in fp32.

        A parameter that the delta does not change comes back as it is. Raises Unfoldable with the reason.
        """
        raise Unfoldable(f"{type(self).__name__} cannot be folded into a weight")

    def fold_rows(self, name: str, weight: Tensor, first: int) -> Tensor | None:
        """`fold` of some rows of the parameter as it is stored, from row `first` on: the same numbers with less memory.

        None where the change of a row needs the others, or the shape of the whole changes.
        """
        return None

    def folds(self) -> tuple[str, ...]:
        """Names of the module's parameters that `fold` changes (`weight`, `bias`)."""
        return ()

    def shape(self, name: str, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Of what `fold` makes of a parameter that is stored in this shape."""
        return stored

    def mirrors(self) -> tuple[str, ...]:
        """Those of `folds` that are tied to a parameter elsewhere, where the same change is made by another delta."""
        return ()


class Injected(NamedTuple):
    """A delta and where it sits. `source` names another module whose first input is `x` (parallel adapters)."""

    path: str
    delta: Delta
    source: str | None = None


class Virtual(NamedTuple):
    """Virtual tokens that every row sees before its first real one: keys and values, or embeddings that are run.

    `keys[l]`, `values[l]`: (kv_heads, length, head_dim) of layer l, as a cache would hold them (after rotation).
    `embeds`: (length, width), as the model's lookup would give them.
    """

    length: int
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    embeds: Tensor | None = None
    paths: tuple[str, ...] = ()  # of an encoder-decoder: the attention that each of the keys and values belongs to

    @property
    def held(self) -> int:
        """How many are keys and values, which take up positions but are not run."""
        return 0 if self.embeds is not None else self.length

    @property
    def run(self) -> int:
        """How many are run as tokens are."""
        return self.length - self.held


class Attachment(nn.Module):
    """All the deltas of one method on one base. A method with more to say overrides the generic answers below."""

    def __init__(self, places: Sequence[Injected] = (), shared: Delta | None = None) -> None:
        super().__init__()
        self.deltas = nn.ModuleList(place.delta for place in places)
        self.paths = [place.path for place in places]
        self.sources = [place.source for place in places]
        self.shared = shared
        self._handles: dict[int, list[torch.utils.hooks.RemovableHandle]] = {}
        self._captured: dict[str, Tensor] = {}
        self._cleanups: list[Callable[[], None]] = []

    @property
    def places(self) -> list[Injected]:
        return [
            Injected(path, delta, source)  # type: ignore[arg-type]
            for path, delta, source in zip(self.paths, self.deltas, self.sources, strict=True)
        ]

    def extend(self, places: Sequence[Injected], first: bool = False) -> None:
        """Add places of another kind, before the hooks are hung. `first`: they are applied before those there are."""
        every = [*places, *self.places] if first else [*self.places, *places]
        self.deltas = nn.ModuleList(place.delta for place in every)
        self.paths = [place.path for place in every]
        self.sources = [place.source for place in every]

    def named_deltas(self) -> Iterator[tuple[str, Delta]]:
        """Each delta with the prefix of its saved names; a shared one has none."""
        yield from zip(self.paths, self.deltas, strict=True)
        if self.shared is not None:
            yield "", self.shared

    def tensors(self) -> dict[str, Tensor]:
        """Everything saved, under `path.name`."""
        return {dotted(path, n): t for path, delta in self.named_deltas() for n, t in delta.tensors().items()}

    def written(self) -> dict[str, Tensor]:
        """Everything that an adapter's file holds, under `path.name`."""
        return {dotted(path, n): t for path, delta in self.named_deltas() for n, t in delta.written().items()}

    def trainable(self) -> dict[str, nn.Parameter]:
        """Everything trained, under `path.name`."""
        return {dotted(path, n): p for path, delta in self.named_deltas() for n, p in delta.trainable().items()}

    def moving(self) -> dict[str, Tensor]:
        """Everything that training changes and answers depend on; a superset of `trainable`."""
        return dict(self.trainable())

    def fit(self, tensors: Mapping[str, Tensor], origin: str = "adapter") -> None:
        """Refuse saved values of which a name is missing, unknown, or of another shape. Raises FormatError."""
        own, found = ({n: tuple(t.shape) for n, t in some.items()} for some in (self.tensors(), tensors))
        wrong = [f"{n}: missing, {shape} expected" for n, shape in own.items() if n not in found]
        wrong += [f"{n}: {shape}, not part of this adapter" for n, shape in found.items() if n not in own]
        wrong += [f"{n}: {found[n]}, {own[n]} expected" for n in found if found[n] != own.get(n, found[n])]
        if wrong:
            raise FormatError(f"{origin} does not fit this base: {several(wrong)}")

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], origin: str = "adapter") -> None:
        """Copy saved values in, all or none. Raises FormatError where they do not `fit`."""
        self.fit(tensors, origin)
        own = self.tensors()
        for name, value in tensors.items():
            own[name].copy_(value)

    @property
    def enabled(self) -> bool:
        return all(delta.enabled for _, delta in self.named_deltas())

    def enable(self, on: bool) -> None:
        for _, delta in self.named_deltas():
            delta.enabled = on

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base, bit for bit, for the length of a `with`."""
        before = [delta.enabled for _, delta in self.named_deltas()]
        self.enable(False)
        try:
            yield
        finally:
            for (_, delta), on in zip(self.named_deltas(), before, strict=True):
                delta.enabled = on

    def virtual(self) -> Virtual | None:
        """The virtual tokens, None for a method without any (or while it is disabled)."""
        return None

    def groups(self) -> dict[str, float]:
        """Learning-rate multipliers of single parameters, by saved name; 1 for those not named."""
        return {}

    def penalty(self) -> Tensor | None:
        """A scalar to be added once to the loss of an optimizer step, with its gradient; None for nothing."""
        return None

    def after_backward(self, step: int, total: int) -> None:
        """Called once an optimizer step with all gradients in place, before clipping."""

    def install(self, model: nn.Module) -> None:
        """Hang the deltas on the model. The order of the places is the order of their application."""
        for index, place in enumerate(self.places):
            module, handles = model.get_submodule(place.path), self._handles.setdefault(index, [])
            if place.delta.stands_in:
                handles.append(module.register_forward_pre_hook(_replacing(place.delta)))
                handles.append(module.register_forward_hook(_restoring(place.delta), always_call=True))
                continue
            if place.delta.on_input:
                handles.append(module.register_forward_pre_hook(_preparing(place.delta), with_kwargs=True))
                continue
            if place.source is not None:
                source = model.get_submodule(place.source)
                handles.append(source.register_forward_pre_hook(self._capturing(index), with_kwargs=True))
            handles.append(module.register_forward_hook(self._changing(index), with_kwargs=True))

    def release(self, index: int) -> None:
        """Take one place's hooks off: its module computes the change by itself from here on."""
        for handle in self._handles.pop(index, ()):
            handle.remove()

    def remove(self) -> None:
        """Take every hook off again, and undo what else was done to the model for the deltas' sake."""
        for index in list(self._handles):
            self.release(index)
        self._captured.clear()
        while self._cleanups:
            self._cleanups.pop()()

    def at_removal(self, cleanup: Callable[[], None]) -> None:
        """Something to call when the hooks are taken off."""
        self._cleanups.append(cleanup)

    def _capturing(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.deltas[index].enabled:
                self._captured[str(index)] = _first_input(args, kwargs)

        return hook

    def _changing(self, index: int) -> Any:
        delta: Delta = self.deltas[index]  # type: ignore[assignment]
        captured = str(index) if self.sources[index] is not None else None

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not delta.enabled:
                return output
            x = self._captured.pop(captured) if captured is not None else _first_input(args, kwargs)
            if delta.reenters:
                return module.forward(delta(x, output))  # past the hooks, so that this one is not called again
            # a decoder block may answer with a tuple whose first item is the hidden state
            if isinstance(output, tuple):
                return (delta(x, output[0]), *output[1:])
            return delta(x, output)

        return hook


def _preparing(delta: Delta) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not delta.enabled:
            return None
        x = _first_input(args, kwargs)
        changed = delta(x, x)
        return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {next(iter(kwargs)): changed})

    return hook


def _replacing(delta: Delta) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if delta.enabled:
            # an attribute is found before a registered parameter of its name, which stays as it is
            for name, value in delta.stand_ins(module).items():
                dtype = module.get_parameter(name).dtype
                vars(module)[name] = value if value.dtype is dtype else value.to(dtype)

    return hook


def _restoring(delta: Delta) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for name in delta.folds():
            vars(module).pop(name, None)

    return hook


def _first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    value: Tensor = args[0] if args else next(iter(kwargs.values()))
    return value
