"""BitFit: nothing but the biases, as differences from the base's. https://arxiv.org/abs/2106.10199"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from peftctl.methods.base import Counted, Method, MethodConfig, Stored, Traits, Write
from peftctl.skeleton import Skeleton, covered

if TYPE_CHECKING:
    from torch import nn

    from peftctl.methods.attachment import Attachment


class BitfitConfig(MethodConfig):
    biases: Literal["all", "query+mlp"] = Field(
        "all", description="all, or the paper's half: those of the query and of the MLP's middle"
    )
    add_missing: bool = Field(
        False, description="give linear layers without a bias one; such a change cannot be merged"
    )


def _traits(config: BitfitConfig) -> Traits:
    return Traits(foldable=not config.add_missing)


def _count(skeleton: Skeleton, config: BitfitConfig) -> Counted:
    from peftctl.methods.bitfit.places import places, width

    modules = places(skeleton, config.biases, config.add_missing)
    missing = sum("bias" not in m.shapes for m in modules)
    sizes = {m.path: width(m) for m in modules}
    return Counted(sizes, f"{len(modules)} biases ({missing} of them added) in {covered(skeleton, sizes)}")


def _attach(model: nn.Module, config: BitfitConfig) -> Attachment:
    from peftctl.methods.bitfit.delta import attach

    return attach(model, config)


def _likeness() -> Callable[[Stored], Write]:
    from peftctl.methods.bitfit.peft import as_another

    return as_another


METHOD = Method(
    name="bitfit",
    summary="the biases alone",
    paper="https://arxiv.org/abs/2106.10199",
    config=BitfitConfig,
    traits=_traits,
    count=_count,
    attach=_attach,
    likeness=_likeness,
)
