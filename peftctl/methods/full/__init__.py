"""Full fine-tuning: the weights themselves, as copies beside the frozen base. What the papers compare with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from peftctl.errors import TargetError
from peftctl.methods import whole
from peftctl.methods.base import Counted, Method, MethodConfig, Traits
from peftctl.methods.whole import Weights
from peftctl.skeleton import EXPERTS, Module, Skeleton, covered, layer_of, select

if TYPE_CHECKING:
    from torch import nn

    from peftctl.methods.attachment import Attachment


class FullConfig(MethodConfig):
    target_modules: str | Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="all-linear, a list of names, or a regex; null: every module with weights"
    )
    layers: Annotated[list[int], Field(min_length=1)] | None = Field(None, description="these layers only, from 0 on")
    last_layers: int | None = Field(None, ge=1, description="the last so many layers only, in the place of layers")

    @model_validator(mode="after")
    def _layers_once(self) -> FullConfig:
        if self.layers is not None and self.last_layers is not None:
            raise ValueError("give either layers or last_layers, not both")
        return self


def weights(skeleton: Skeleton, config: FullConfig) -> Weights:
    """What is trained. Raises TargetError."""
    return whole.weights(skeleton, _modules(skeleton, config))


def _modules(skeleton: Skeleton, config: FullConfig) -> list[Module]:
    layers = _layers(skeleton, config)
    if config.target_modules is None:
        chosen = [m for m in skeleton.modules if m.shapes]
        return chosen if layers is None else [m for m in chosen if layer_of(m.path) in layers]
    kinds = frozenset(m.kind for m in skeleton.modules if m.shapes) - EXPERTS  # no one parameter of a module alone
    return list(select(skeleton, config.target_modules, kinds=kinds, layers=layers).modules)


def _layers(skeleton: Skeleton, config: FullConfig) -> list[int] | None:
    count = skeleton.dimensions.deepest
    if config.last_layers is not None:
        if config.last_layers > count:
            raise TargetError(f"method.last_layers: {skeleton.architecture} has {count} layers")
        return list(range(count - config.last_layers, count))
    outside = [layer for layer in config.layers or () if not 0 <= layer < count]
    if outside:
        raise TargetError(
            f"method.layers: {outside[0]} is not a layer of {skeleton.architecture}; 0 to {count - 1} are"
        )
    return config.layers


def _count(skeleton: Skeleton, config: FullConfig) -> Counted:
    places = weights(skeleton, config).sizes(skeleton)
    return Counted(places, f"the weights of {len(places)} modules, {covered(skeleton, places)} among them")


def _attach(model: nn.Module, config: FullConfig) -> Attachment:
    from peftctl.methods.full.delta import attach

    return attach(model, config)


METHOD = Method(
    name="full",
    summary="the weights themselves: what the papers compare with",
    paper="https://arxiv.org/abs/1801.06146",
    config=FullConfig,
    traits=lambda config: Traits(),
    count=_count,
    attach=_attach,
)
