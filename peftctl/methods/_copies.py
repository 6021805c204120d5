"""Copies of a module's parameters that are trained in their place: for methods that train weights as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from peftctl import surgery
from peftctl.methods.attachment import Delta, Injected
from peftctl.methods.whole import Weights
from peftctl.skeleton import dotted


class Copies(Delta):
    """fp32 copies (fp64 of fp64) of some of a module's own parameters, under their names.

    `elsewhere`: parameters that are tied to one of another module, by name, with that module's copies and its name
    there; they are neither saved nor trained twice.
    """

    stands_in = True

    def __init__(
        self, module: nn.Module, names: Iterable[str], elsewhere: Mapping[str, tuple[Copies, str]] | None = None
    ) -> None:
        super().__init__()
        for name in names:
            value = module.get_parameter(name).detach()
            # the same numbers: step 0 is the base model
            self.register_parameter(
                name, nn.Parameter(value.to(torch.promote_types(value.dtype, torch.float32)).clone())
            )
        self.elsewhere = dict(elsewhere or {})

    def stand_ins(self, module: nn.Module) -> dict[str, Tensor]:
        return self._values()

    def _values(self) -> dict[str, Tensor]:
        own: dict[str, Tensor] = dict(self.named_parameters())
        return own | {name: copies.get_parameter(there) for name, (copies, there) in self.elsewhere.items()}

    def folds(self) -> tuple[str, ...]:
        return tuple(self._values())

    def shape(self, name: str, stored: tuple[int, ...]) -> tuple[int, ...]:
        own = tuple(self._values()[name].shape)
        return own if own[1:] == stored[1:] and own[:1] > stored[:1] else stored  # a vocabulary that was grown

    def mirrors(self) -> tuple[str, ...]:
        return tuple(self.elsewhere)

    def fold(self, name: str, weight: Tensor) -> Tensor:
        value = self._values().get(name)
        return weight if value is None else value.detach().to(weight.device)


def copied(model: nn.Module, trained: Weights) -> list[Injected]:
    """Copies at every module that they name, tied parameters with the same copy at each of their places."""
    found: dict[str, Copies] = {}  # in the order of the modules, so that a tied one's first place comes first
    for path, parameters in trained.items():
        elsewhere = {}
        for name, full in parameters.items():
            if full != dotted(path, name):
                first, _, there = full.rpartition(".")
                elsewhere[name] = (found[first], there)
        found[path] = Copies(surgery.find(model, path), trained.own(path), elsewhere)
    return [Injected(path, delta) for path, delta in found.items()]
