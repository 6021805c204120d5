"""LoRA: a low-rank product beside a frozen weight. https://arxiv.org/abs/2106.09685"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from peftctl.methods._lowrank import LowRankConfig
from peftctl.methods.base import Counted, Exchange, Method, Traits
from peftctl.skeleton import Skeleton, alone

if TYPE_CHECKING:
    from torch import nn

    from peftctl.methods.attachment import Attachment


class LoraConfig(LowRankConfig):
    target_modules: str | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear",
        description="all-linear (every linear but the output head), a list of names, or a regex; "
        "a name may be a part of a fused linear (c_attn.q, query_key_value.v), or a parameter that holds a matrix of "
        "all experts (experts.gate_up_proj, experts.down_proj), which all-linear leaves out",
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="ranks of single modules, by the end of their path or a regex for it"
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        {}, description="alphas of single modules, in the same way"
    )
    init: Literal["default", "pissa", "orthogonal"] = Field(
        "default",
        description="what A and B start from: default: noise and zero; pissa: the weight's largest singular values "
        "(https://arxiv.org/abs/2404.02948); orthogonal: its QR decomposition (https://arxiv.org/abs/2406.01775)",
    )
    train_a: bool = Field(True, description="false: A stays as drawn (LoRA-FA, https://arxiv.org/abs/2308.03303)")
    lr_ratio: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="B's learning rate, relative to A's (LoRA+, https://arxiv.org/abs/2402.12354)",
    )
    bias: Literal["none", "lora_only", "all"] = Field(
        "none", description="biases trained as well: none, those of the chosen modules, or all"
    )

    def meaning(self, skeleton: Skeleton) -> dict[str, Any]:
        from peftctl.methods.lora.places import places

        return {f"the scale (alpha / rank) of {one.module.path}": one.scale for one in places(skeleton, self).places}

    @model_validator(mode="after")
    def _one_start(self) -> LoraConfig:
        if self.init != "default" and self.init_from is not None:
            raise ValueError(f"init_from brings its own start, so init: {self.init} has no place; leave it out")
        return self


def _count(skeleton: Skeleton, config: LoraConfig) -> Counted:
    from peftctl.methods.lora.places import biases, places

    found = places(skeleton, config)
    alone(skeleton, (place.module for place in found.places))
    sizes = {name: size for place in found.places for name, size in place.sizes(config.train_a).items()}
    for module in biases(skeleton, config.bias, found.places):
        sizes[module.path] = sizes.get(module.path, 0) + module.shapes["bias"][0]
    return Counted(sizes, found.summary)


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
