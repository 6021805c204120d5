"""LN-tuning: the norms' weights and biases, and nothing else. https://arxiv.org/abs/2312.11420"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from peftctl.errors import TargetError
from peftctl.methods.base import Counted, Exchange, Method, MethodConfig, Traits
from peftctl.skeleton import Selection, Skeleton, select

if TYPE_CHECKING:
    from torch import nn

    from peftctl.methods.attachment import Attachment


class LnTuningConfig(MethodConfig):
    target_modules: str | Annotated[list[str], Field(min_length=1)] = Field(
        ".*", description="which norms (LayerNorm, RMSNorm): a list of names, or a regex"
    )


def norms(skeleton: Skeleton, config: LnTuningConfig) -> Selection:
    """The norms to train. Raises TargetError."""
    if not any(m.kind == "Norm" and "weight" in m.shapes for m in skeleton.modules):
        raise TargetError(f"method: {skeleton.architecture} has no norm with a weight to train")
    return select(skeleton, config.target_modules, kinds=frozenset({"Norm"}))


def _count(skeleton: Skeleton, config: LnTuningConfig) -> Counted:
    selection = norms(skeleton, config)
    return Counted({m.path: sum(map(prod, m.shapes.values())) for m in selection.modules}, selection.summary)


def _attach(model: nn.Module, config: LnTuningConfig) -> Attachment:
    from peftctl.methods.ln_tuning.delta import attach

    return attach(model, config)


def _exchange() -> Exchange:
    from peftctl.methods.ln_tuning.peft import EXCHANGE

    return EXCHANGE


METHOD = Method(
    name="ln-tuning",
    summary="the norms' weights and biases alone",
    paper="https://arxiv.org/abs/2312.11420",
    config=LnTuningConfig,
    traits=lambda config: Traits(),
    count=_count,
    attach=_attach,
    exchange=_exchange,
)
