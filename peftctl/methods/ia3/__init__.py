"""(IA)3: trained factors on keys, values and the MLP's middle. https://arxiv.org/abs/2205.05638"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field, model_validator

from peftctl.errors import TargetError
from peftctl.methods._blocks import down_projection, every_block, keys_and_values
from peftctl.methods.base import Counted, Exchange, Method, MethodConfig, Traits
from peftctl.skeleton import Module, Skeleton, alone, covered, select

if TYPE_CHECKING:
    from torch import nn

    from peftctl.methods.attachment import Attachment


class Ia3Config(MethodConfig):
    target_modules: str | list[str] | None = Field(
        None,
        description="whose outputs are scaled: names, or a regex; null: the key and value projections (where they are "
        "fused with the query's, all three)",
    )
    feedforward_modules: str | list[str] | None = Field(
        None, description="whose inputs are scaled: names, or a regex; null: the linear that ends each MLP; []: none"
    )

    def meaning(self, skeleton: Skeleton) -> dict[str, Any]:
        found = scaled(skeleton, self)
        sides = {"output": found.outputs, "input": found.inputs}
        return {f"what is scaled of {m.path}": side for side, modules in sides.items() for m in modules}

    @model_validator(mode="after")
    def _something(self) -> Ia3Config:
        if self.target_modules == [] and self.feedforward_modules == []:
            raise ValueError("target_modules and feedforward_modules are both empty, so nothing would be trained")
        return self


class Scaled(NamedTuple):
    """The linears whose outputs, and those whose inputs, get a factor each."""

    outputs: tuple[Module, ...]
    inputs: tuple[Module, ...]


def scaled(skeleton: Skeleton, config: Ia3Config) -> Scaled:
    """Raises TargetError where a default has no place, or a module would be scaled on both sides."""
    found = Scaled(_outputs(skeleton, config.target_modules), _inputs(skeleton, config.feedforward_modules))
    both = [m.path for m in found.outputs if m in found.inputs]
    if both:
        raise TargetError(
            f"method.feedforward_modules: {both[0]} of {skeleton.architecture} is among target_modules as well; "
            "name it in one of them"
        )
    return found


def _outputs(skeleton: Skeleton, targets: str | list[str] | None) -> tuple[Module, ...]:
    if targets is not None:
        return select(skeleton, targets).modules if targets != [] else ()
    found: list[Module] = []
    for block in (attending for whole in every_block(skeleton) for attending in whole.attentions):
        projections = keys_and_values(skeleton, block)
        if not projections:
            raise TargetError(
                f"method.target_modules: {block.path} of {skeleton.architecture} has no projections of keys and values "
                "that could be told; name the modules to scale"
            )
        found += projections
    return tuple(found)


def _inputs(skeleton: Skeleton, targets: str | list[str] | None) -> tuple[Module, ...]:
    if targets is not None:
        return select(skeleton, targets, key="method.feedforward_modules").modules if targets != [] else ()
    found = []
    for block in every_block(skeleton):
        down = down_projection(skeleton, block)
        if down is None:
            raise TargetError(
                f"method.feedforward_modules: {block.path} of {skeleton.architecture} has no single linear that ends "
                "its MLP; name the modules whose inputs to scale, or give [] for none"
            )
        found.append(down)
    return tuple(found)


def _count(skeleton: Skeleton, config: Ia3Config) -> Counted:
    found = scaled(skeleton, config)
    alone(skeleton, found.outputs)
    alone(skeleton, found.inputs, "method.feedforward_modules")
    places = {m.path: m.out_features for m in found.outputs} | {m.path: m.in_features for m in found.inputs}
    names = ", ".join(dict.fromkeys(p.rsplit(".", 1)[-1] for p in places))
    return Counted(
        places,
        f"{len(found.outputs)} outputs and {len(found.inputs)} inputs scaled in {covered(skeleton, places)}: {names}",
    )


def _attach(model: nn.Module, config: Ia3Config) -> Attachment:
    from peftctl.methods.ia3.delta import attach

    return attach(model, config)


def _exchange() -> Exchange:
    from peftctl.methods.ia3.peft import EXCHANGE

    return EXCHANGE


METHOD = Method(
    name="ia3",
    summary="trained factors on keys, values and the MLP's middle",
    paper="https://arxiv.org/abs/2205.05638",
    config=Ia3Config,
    traits=lambda config: Traits(),
    count=_count,
    attach=_attach,
    exchange=_exchange,
)
