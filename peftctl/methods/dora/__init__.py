"""DoRA: a weight's direction by a low-rank product, its magnitude by a vector. https://arxiv.org/abs/2402.09353"""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftctl.methods._lowrank import LowRankConfig, targets
from peftctl.methods.base import Counted, Exchange, Method, Traits
from peftctl.skeleton import Skeleton, alone

if TYPE_CHECKING:
    from torch import nn

    from peftctl.methods.attachment import Attachment


class DoraConfig(LowRankConfig):
    pass


def _count(skeleton: Skeleton, config: DoraConfig) -> Counted:
    selection = targets(skeleton, config, config.rank)
    alone(skeleton, selection.modules)
    places = {m.path: config.rank * (m.in_features + m.out_features) + m.out_features for m in selection.modules}
    return Counted(places, selection.summary)


def _attach(model: nn.Module, config: DoraConfig) -> Attachment:
    from peftctl.methods.dora.delta import attach

    return attach(model, config)


def _exchange() -> Exchange:
    from peftctl.methods.dora.peft import EXCHANGE

    return EXCHANGE


METHOD = Method(
    name="dora",
    summary="a low-rank product for a weight's direction, a vector for its magnitude",
    paper="https://arxiv.org/abs/2402.09353",
    config=DoraConfig,
    traits=lambda config: Traits(),
    count=_count,
    attach=_attach,
    exchange=_exchange,
)
