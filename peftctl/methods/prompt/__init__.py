"""Prompt tuning: trained embeddings before those of the tokens. https://arxiv.org/abs/2104.08691"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from peftctl.methods._prompts import embedded
from peftctl.methods.base import Counted, Exchange, Method, MethodConfig, Traits
from peftctl.skeleton import Skeleton

if TYPE_CHECKING:
    from torch import nn

    from peftctl.methods.attachment import Attachment


class PromptConfig(MethodConfig):
    num_virtual_tokens: int = Field(20, ge=1, description="virtual tokens before the first real one")
    init: Literal["vocabulary", "random"] = Field(
        "vocabulary", description="vocabulary: embeddings of tokens drawn at random; random: numbers in [-0.5, 0.5)"
    )


def _count(skeleton: Skeleton, config: PromptConfig) -> Counted:
    width = embedded(skeleton)
    return Counted(
        {"prompt": config.num_virtual_tokens * width}, f"{config.num_virtual_tokens} virtual tokens of {width}"
    )


def _attach(model: nn.Module, config: PromptConfig) -> Attachment:
    from peftctl.methods.prompt.delta import attach

    return attach(model, config)


def _exchange() -> Exchange:
    from peftctl.methods.prompt.peft import EXCHANGE

    return EXCHANGE


METHOD = Method(
    name="prompt",
    summary="trained embeddings before those of the tokens",
    paper="https://arxiv.org/abs/2104.08691",
    config=PromptConfig,
    traits=lambda config: Traits(starts_as_identity=False, foldable=False, virtual_tokens=config.num_virtual_tokens),
    count=_count,
    attach=_attach,
    exchange=_exchange,
)
