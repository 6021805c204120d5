"""What methods of low rank have in common: the keys that choose and scale, the targets, the bound on a rank."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from peftctl.errors import TargetError
from peftctl.methods.base import MethodConfig
from peftctl.skeleton import LINEAR, Module, Selection, Skeleton, select


class TargetedConfig(MethodConfig):
    """Keys of a method that changes chosen weights."""

    target_modules: str | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear", description="all-linear (every linear but the output head), a list of names, or a regex"
    )
    layers: Annotated[list[int], Field(min_length=1)] | None = Field(None, description="these layers only, from 0 on")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the input of A, in training")


class LowRankConfig(TargetedConfig):
    """The same with a rank and a scale."""

    rank: int = Field(16, ge=1, description="rank of the product; at most the module's smaller side")
    alpha: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="the product is scaled by alpha / rank; null: 2 * rank"
    )
    rank_stabilized: bool = Field(False, description="scale by alpha / sqrt(rank), https://arxiv.org/abs/2312.03732")

    @property
    def scale(self) -> float:
        return scale(self.rank, 2 * self.rank if self.alpha is None else self.alpha, self.rank_stabilized)

    def meaning(self, skeleton: Skeleton) -> dict[str, Any]:
        return {"the scale (alpha / rank)": self.scale}


def scale(rank: int, alpha: float, stabilized: bool = False) -> float:
    """What a product of that rank is multiplied by."""
    return float(alpha / rank**0.5 if stabilized else alpha / rank)


def targets(skeleton: Skeleton, config: TargetedConfig, rank: int, key: str = "method.rank") -> Selection:
    """The linears that are changed by products of one rank. Raises TargetError."""
    selection = select(skeleton, config.target_modules, kinds=LINEAR, layers=config.layers)
    for module in selection.modules:
        bounded(module, rank, key)
    return selection


def bounded(module: Module, rank: int, key: str = "method.rank") -> None:
    """Refuse a rank that no matrix of that shape has. Raises TargetError."""
    least = min(module.in_features, module.out_features)
    if rank > least:
        raise TargetError(f"{key}: {rank} is above {least}, the smaller side of {module.path}; use at most {least}")
