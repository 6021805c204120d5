"""LoRA: a low-rank product beside a frozen weight. https://arxiv.org/abs/2106.09685"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from peftctl.errors import TargetError
from peftctl.methods.base import Counted, Exchange, Method, MethodConfig, Traits
from peftctl.skeleton import LINEAR_OR_EMBEDDING, Selection, Skeleton, select

if TYPE_CHECKING:
    from torch import nn

    from peftctl.methods.attachment import Attachment


class LoraConfig(MethodConfig):
    rank: int = Field(16, ge=1, description="rank of the product; at most the module's smaller side")
    alpha: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="the product is scaled by alpha / rank; null: 2 * rank"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="on the input of A, in training")
    target_modules: str | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear", description="all-linear (every linear but the output head), a list of names, or a regex"
    )
    layers: Annotated[list[int], Field(min_length=1)] | None = Field(None, description="these layers only, from 0 on")
    rank_stabilized: bool = Field(False, description="scale by alpha / sqrt(rank), https://arxiv.org/abs/2312.03732")

    @property
    def scale(self) -> float:
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        return float(alpha / self.rank**0.5 if self.rank_stabilized else alpha / self.rank)


def targets(skeleton: Skeleton, config: LoraConfig) -> Selection:
    """The modules that get a product. Raises TargetError."""
    selection = select(skeleton, config.target_modules, kinds=LINEAR_OR_EMBEDDING, layers=config.layers)
    for module in selection.modules:
        least = min(module.in_features, module.out_features)
        if config.rank > least:
            raise TargetError(
                f"method.rank: {config.rank} is above {least}, the smaller side of {module.path}; use at most {least}"
            )
        # a subclass may look rows up by something other than its input (OPT's positions)
        if module.kind == "Embedding" and not (module.type == "Embedding" or module.type.endswith("WordEmbedding")):
            raise TargetError(
                f"method.target_modules: {module.path} is a {module.type}, which lora cannot adapt; leave it out"
            )
    return selection


def _count(skeleton: Skeleton, config: LoraConfig) -> Counted:
    selection = targets(skeleton, config)
    places = {m.path: config.rank * (m.in_features + m.out_features) for m in selection.modules}
    return Counted(places, selection.summary)


def _attach(model: nn.Module, config: LoraConfig) -> Attachment:
    from peftctl.methods.lora.delta import attach

    return attach(model, config)


def _exchange() -> Exchange:
    from peftctl.methods.lora.peft import EXCHANGE

    return EXCHANGE


METHOD = Method(
    name="lora",
    summary="a trained low-rank product beside each chosen weight",
    paper="https://arxiv.org/abs/2106.09685",
    config=LoraConfig,
    traits=lambda config: Traits(low_rank=True),
    count=_count,
    attach=_attach,
    exchange=_exchange,
)
