"""New rows of a vocabulary: the only part of the embeddings and the output head that is trained.

The base is grown by rows that start at the mean of its own, and stays so; a delta holds trained copies of the new
tokens' rows and adds how far they have come. Off, it serves their start.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftctl import surgery
from peftctl.errors import TargetError
from peftctl.methods.attachment import Delta, Injected
from peftctl.skeleton import NewRows


class AddedRows(Delta):
    """The new tokens' rows of one matrix (and of a head's bias), in fp32, fp64 of fp64.

    `origin`: the delta that holds them where this matrix is tied to another's; they are saved and trained there alone.
    """

    rows: nn.Parameter
    row_bias: nn.Parameter | None

    def __init__(self, module: nn.Module, new: NewRows, origin: AddedRows | None = None) -> None:
        super().__init__()
        self.new, self.embeds = new, isinstance(module, nn.Embedding)
        self.gain = surgery.embed_scale(module) if self.embeds else 1.0
        self.base = tuple(_own(module))  # looked at and never changed
        self.origin = (origin,) if origin is not None else ()  # behind a tuple, so that it is not part of this delta
        if origin is None:
            self.rows = nn.Parameter(_wide(self.base[0][new.slice].detach()))
        bias = nn.Parameter(_wide(self.base[1][new.slice].detach())) if len(self.base) > 1 else None
        self.register_parameter("row_bias", bias)

    @property
    def trained(self) -> nn.Parameter:
        return self.origin[0].rows if self.origin else self.rows

    def written(self) -> dict[str, Tensor]:
        """As the base computes with them, so that a whole matrix of them has the base's type."""
        return {name: tensor.to(self.base[0].dtype) for name, tensor in self.tensors().items()}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        move = self._moved(self.trained, 0)  # 0 exactly at the start
        if self.embeds:
            at = x - self.new.first
            known = (at >= 0) & (at < self.new.number)
            moved = functional.embedding(at.clamp(0, self.new.number - 1), move.to(y.dtype)) * self.gain
            return y + moved * known[..., None]
        bias = None if self.row_bias is None else self._moved(self.row_bias, 1).to(x.dtype)
        change = functional.linear(x, move.to(x.dtype), bias).to(y.dtype)
        first, last = self.new.first, self.new.first + self.new.number
        return torch.cat([y[..., :first], y[..., first:last] + change, y[..., last:]], dim=-1)

    def _moved(self, trained: Tensor, index: int) -> Tensor:
        """How far they are from their start, as the base's type holds them."""
        own = self.base[index]
        return trained.to(own.dtype).to(trained.dtype) - own[self.new.slice].detach().to(trained.dtype)

    def folds(self) -> tuple[str, ...]:
        return ("weight",) if self.row_bias is None else ("weight", "bias")

    def shape(self, name: str, stored: tuple[int, ...]) -> tuple[int, ...]:
        return (self.new.total, *stored[1:]) if stored[0] == self.new.before else stored

    def mirrors(self) -> tuple[str, ...]:
        return ("weight",) if self.origin else ()

    def fold(self, name: str, weight: Tensor) -> Tensor:
        rows = self.trained if name == "weight" else self.row_bias
        if rows is None:
            return weight
        last = self.new.first + self.new.number
        return torch.cat([weight[: self.new.first], rows.detach().to(weight), weight[last:]])


def _own(module: nn.Module) -> list[nn.Parameter]:
    """Its matrix, and its bias where it has one."""
    return [parameter for name in ("weight", "bias") if (parameter := getattr(module, name, None)) is not None]


def _wide(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).clone()


def added(model: Any, whole: set[str]) -> list[Injected]:
    """The deltas of a grown vocabulary, where the model has one. `whole`: places whose matrix is trained anyway."""
    new = surgery.new_rows(model)
    if new is None:
        return []
    found: dict[str, AddedRows] = {}
    for path in surgery.vocabulary_paths(model):
        module = surgery.find(model, path)
        tied = [delta for other, delta in found.items() if surgery.find(model, other).weight is module.weight]
        if path not in whole:
            found[path] = AddedRows(module, new, tied[0] if tied else None)
    return [Injected(path, delta) for path, delta in found.items()]


def refuse_rewrites(places: list[Injected], paths: set[str]) -> None:
    """Refuse deltas that would not see what the new rows change. Raises TargetError."""
    for path, delta, _ in places:
        if path in paths and not (delta.adds or delta.stands_in):
            raise TargetError(
                f"method: {path} has rows of model.add_tokens, so this method cannot change it; leave it out"
            )
