"""VeRA: one pair of random matrices for all weights, two trained vectors for each. https://arxiv.org/abs/2310.11454"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from peftctl.methods._lowrank import TargetedConfig
from peftctl.methods.base import Counted, Exchange, Method, Traits
from peftctl.skeleton import Skeleton, alone, select

if TYPE_CHECKING:
    from torch import nn

    from peftctl.methods.attachment import Attachment


class VeraConfig(TargetedConfig):
    rank: int = Field(256, ge=1, description="rows of A, columns of B; the matrices are never trained")
    d_initial: float = Field(0.1, gt=0, allow_inf_nan=False, description="what the vector between A and B starts at")
    projection_seed: int = Field(0, ge=0, lt=2**63, description="of the random matrices, which are saved as well")


def _count(skeleton: Skeleton, config: VeraConfig) -> Counted:
    selection = select(skeleton, config.target_modules, layers=config.layers)
    alone(skeleton, selection.modules)
    return Counted({m.path: config.rank + m.out_features for m in selection.modules}, selection.summary)


def _attach(model: nn.Module, config: VeraConfig) -> Attachment:
    from peftctl.methods.vera.delta import attach

    return attach(model, config)


def _exchange() -> Exchange:
    from peftctl.methods.vera.peft import EXCHANGE

    return EXCHANGE


METHOD = Method(
    name="vera",
    summary="two trained vectors for each weight, around random matrices that all share",
    paper="https://arxiv.org/abs/2310.11454",
    config=VeraConfig,
    traits=lambda config: Traits(),
    count=_count,
    attach=_attach,
    exchange=_exchange,
)
