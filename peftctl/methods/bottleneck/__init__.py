"""Bottleneck adapters: a small network with a residual in every block. https://arxiv.org/abs/1902.00751"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from peftctl.methods._places import places
from peftctl.methods.base import Counted, Method, MethodConfig, Traits
from peftctl.skeleton import Skeleton, covered

if TYPE_CHECKING:
    from torch import nn

    from peftctl.methods.attachment import Attachment

Activation = Literal["relu", "gelu", "gelu_new", "swish", "silu", "tanh", "leakyrelu"]


class Preset(NamedTuple):
    """What a paper chose, with the defaults that adapter-hub gives it."""

    activation: Activation
    reduction_factor: float


PRESETS = {
    "houlsby": Preset("swish", 16),
    "pfeiffer": Preset("relu", 16),
    "parallel": Preset("relu", 2),
}


class BottleneckConfig(MethodConfig):
    preset: Literal["houlsby", "pfeiffer", "parallel"] = Field(
        "pfeiffer",
        description="houlsby: after attention and after the MLP (https://arxiv.org/abs/1902.00751); pfeiffer: after "
        "the block (https://arxiv.org/abs/2005.00247); parallel: beside the MLP (https://arxiv.org/abs/2110.04366)",
    )
    reduction_factor: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="hidden width / bottleneck width; null: 16 (parallel: 2)"
    )
    width: int | None = Field(None, ge=1, description="bottleneck width, instead of reduction_factor")
    activation: Activation | None = Field(None, description="null: the preset's (houlsby: swish, else relu)")

    @model_validator(mode="after")
    def _one_width(self) -> BottleneckConfig:
        if self.width is not None and self.reduction_factor is not None:
            raise ValueError("give either width or reduction_factor, not both")
        return self

    def meaning(self, skeleton: Skeleton) -> dict[str, Any]:
        return {"preset": self.preset, "activation": self.activation or PRESETS[self.preset].activation}

    def width_in(self, hidden: int) -> int:
        """Width of the bottleneck for a hidden width, at least 1."""
        return self.width or max(1, int(hidden // (self.reduction_factor or PRESETS[self.preset].reduction_factor)))


def _traits(config: BottleneckConfig) -> Traits:
    # the others start near the identity, from small random numbers
    return Traits(starts_as_identity=config.preset == "parallel", foldable=False)


def _count(skeleton: Skeleton, config: BottleneckConfig) -> Counted:
    hidden = skeleton.dimensions.hidden
    width = config.width_in(hidden)
    found = places(skeleton, config.preset)
    layers = covered(skeleton, [place.path for place in found])
    size = 2 * hidden * width + width + hidden  # both weights and both biases
    return Counted(
        {place.path: size for place in found},
        f"{len(found)} bottlenecks of width {width} in {layers} ({config.preset})",
    )


def _attach(model: nn.Module, config: BottleneckConfig) -> Attachment:
    from peftctl.methods.bottleneck.delta import attach

    return attach(model, config)


METHOD = Method(
    name="bottleneck",
    summary="a small trained network in every block (Houlsby, Pfeiffer, parallel)",
    paper="https://arxiv.org/abs/1902.00751",
    config=BottleneckConfig,
    traits=_traits,
    count=_count,
    attach=_attach,
)
