"""AdaLoRA: low-rank products whose ranks are dealt out by importance while training. https://arxiv.org/abs/2303.10512"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from peftctl.methods._lowrank import TargetedConfig, targets
from peftctl.methods.base import Counted, Exchange, Method, Traits
from peftctl.skeleton import Skeleton, alone

if TYPE_CHECKING:
    from torch import nn

    from peftctl.methods.attachment import Attachment


class AdaloraConfig(TargetedConfig):
    rank: int = Field(8, ge=1, description="mean rank of a module at the end: the budget")
    initial_rank: int | None = Field(None, ge=1, description="rank of every module at first; null: 1.5 * rank")
    alpha: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="scaled by alpha / initial_rank; null: 2 * initial_rank"
    )
    budget_warmup: float = Field(0.1, ge=0, description="before any pruning; below 1 a fraction of the steps")
    budget_final: float = Field(0.3, ge=0, description="after the last pruning; below 1 a fraction of the steps")
    interval: int = Field(10, ge=1, description="steps from one pruning to the next")
    importance_beta: float = Field(0.85, gt=0, lt=1, description="decay of the mean importance")
    uncertainty_beta: float = Field(0.85, gt=0, lt=1, description="decay of the mean deviation from it")
    orthogonality: float = Field(0.5, ge=0, allow_inf_nan=False, description="weight of the penalty on both factors")

    @model_validator(mode="after")
    def _possible(self) -> AdaloraConfig:
        if self.rank > self.first_rank:
            raise ValueError(f"initial_rank {self.first_rank} is below rank {self.rank}: there is nothing to prune")
        if max(self.budget_warmup, self.budget_final) < 1 and self.budget_warmup + self.budget_final >= 1:
            raise ValueError("budget_warmup and budget_final leave no steps for pruning: lower them")
        return self

    @property
    def first_rank(self) -> int:
        return self.initial_rank or (3 * self.rank + 1) // 2

    @property
    def scale(self) -> float:
        return 2.0 if self.alpha is None else self.alpha / self.first_rank

    def meaning(self, skeleton: Skeleton) -> dict[str, Any]:
        return {"the scale (alpha / initial_rank)": self.scale}


def _count(skeleton: Skeleton, config: AdaloraConfig) -> Counted:
    selection = targets(skeleton, config, config.first_rank, "method.initial_rank")
    alone(skeleton, selection.modules)
    rank = config.first_rank
    return Counted({m.path: rank * (m.in_features + 1 + m.out_features) for m in selection.modules}, selection.summary)


def _attach(model: nn.Module, config: AdaloraConfig) -> Attachment:
    from peftctl.methods.adalora.delta import attach

    return attach(model, config)


def _exchange() -> Exchange:
    from peftctl.methods.adalora.peft import EXCHANGE

    return EXCHANGE


METHOD = Method(
    name="adalora",
    summary="low-rank products whose ranks are dealt out by importance",
    paper="https://arxiv.org/abs/2303.10512",
    config=AdaloraConfig,
    traits=lambda config: Traits(low_rank=True),
    count=_count,
    attach=_attach,
    exchange=_exchange,
)
