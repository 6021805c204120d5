"""Compacter: bottlenecks whose weights are sums of Kronecker products. https://arxiv.org/abs/2106.04647"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from peftctl.errors import TargetError
from peftctl.methods._places import Place, places
from peftctl.methods.base import Counted, Method, MethodConfig, Traits
from peftctl.skeleton import Skeleton, covered

if TYPE_CHECKING:
    from torch import nn

    from peftctl.methods.attachment import Attachment


class CompacterConfig(MethodConfig):
    preset: Literal["compacter", "compacter++"] = Field(
        "compacter++", description="compacter: after attention and after the MLP; compacter++: after the block"
    )
    phm_dim: int = Field(
        4, ge=1, description="n: how many products are added up, and the side of their shared matrices"
    )
    rank: int = Field(1, ge=1, description="rank of each product's own factor")
    reduction_factor: float = Field(
        32.0,
        gt=0,
        allow_inf_nan=False,
        description="hidden width / bottleneck width, which becomes a multiple of phm_dim",
    )
    width: int | None = Field(None, ge=1, description="bottleneck width, in the place of reduction_factor")

    @model_validator(mode="after")
    def _divided(self) -> CompacterConfig:
        if self.width is not None and self.width % self.phm_dim:
            raise ValueError(f"width {self.width} is no multiple of phm_dim, {self.phm_dim}")
        return self

    def width_in(self, hidden: int) -> int:
        """Width of the bottleneck for a hidden width, at least `phm_dim`."""
        return self.width or max(1, int(hidden / self.reduction_factor / self.phm_dim)) * self.phm_dim


def placed(skeleton: Skeleton, config: CompacterConfig) -> list[Place]:
    """Where they sit. Raises TargetError."""
    hidden = skeleton.dimensions.hidden
    if hidden % config.phm_dim:
        raise TargetError(
            f"method.phm_dim: {config.phm_dim} does not divide {hidden}, the hidden width of {skeleton.architecture}"
        )
    most = min(hidden, config.width_in(hidden)) // config.phm_dim
    if config.rank > most:
        raise TargetError(
            f"method.rank: {config.rank} is above {most}, the smaller side of a factor; use at most {most}"
        )
    return places(skeleton, "houlsby" if config.preset == "compacter" else "pfeiffer")


def _count(skeleton: Skeleton, config: CompacterConfig) -> Counted:
    hidden, found = skeleton.dimensions.hidden, placed(skeleton, config)
    width, layers = config.width_in(hidden), covered(skeleton, [place.path for place in found])
    size = 2 * config.rank * (hidden + width) + width + hidden  # the factors of both weights, and both biases
    return Counted(
        {"rule": config.phm_dim**3} | {place.path: size for place in found},
        f"{len(found)} bottlenecks of width {width} in {layers} ({config.preset})",
    )


def _attach(model: nn.Module, config: CompacterConfig) -> Attachment:
    from peftctl.methods.compacter.delta import attach

    return attach(model, config)


METHOD = Method(
    name="compacter",
    summary="bottlenecks whose weights are sums of Kronecker products",
    paper="https://arxiv.org/abs/2106.04647",
    config=CompacterConfig,
    traits=lambda config: Traits(foldable=False),
    count=_count,
    attach=_attach,
)
