"""P-tuning: embeddings before those of the tokens, made by a small trained encoder. https://arxiv.org/abs/2103.10385"""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from peftctl.methods._prompts import embedded
from peftctl.methods.base import Counted, Exchange, Method, MethodConfig, Traits
from peftctl.skeleton import Skeleton

if TYPE_CHECKING:
    from torch import nn

    from peftctl.methods.attachment import Attachment

LSTM_LAYERS = 2  # as in the authors' code


class PTuningConfig(MethodConfig):
    num_virtual_tokens: int = Field(20, ge=1, description="virtual tokens before the first real one")
    encoder: Literal["mlp", "lstm", "none"] = Field(
        "mlp", description="what makes their embeddings from trained ones; none: they are trained as they are"
    )
    hidden_size: int | None = Field(None, ge=1, description="width of the encoder; null: that of an embedding")

    @model_validator(mode="after")
    def _hidden_size_of_something(self) -> PTuningConfig:
        if self.hidden_size is not None and self.encoder == "none":
            raise ValueError("hidden_size is the width of the encoder; choose encoder: mlp or lstm as well")
        return self


def shapes(config: PTuningConfig, width: int) -> dict[str, tuple[int, ...]]:
    """The trained tensors for embeddings of a width."""
    size = config.hidden_size or width
    found: dict[str, tuple[int, ...]] = {"embedding": (config.num_virtual_tokens, width)}
    if config.encoder == "mlp":
        return found | _linears(width, size, size, width)
    if config.encoder == "lstm":
        for layer in range(LSTM_LAYERS):
            for end in (f"l{layer}", f"l{layer}_reverse"):
                found |= {
                    f"lstm.weight_ih_{end}": (4 * size, width if layer == 0 else 2 * size),
                    f"lstm.weight_hh_{end}": (4 * size, size),
                    f"lstm.bias_ih_{end}": (4 * size,),
                    f"lstm.bias_hh_{end}": (4 * size,),
                }
        return found | _linears(2 * size, 2 * size, width)
    return found


def _linears(*widths: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for index, (into, out) in enumerate(pairwise(widths)):
        found |= {f"linears.{index}.weight": (out, into), f"linears.{index}.bias": (out,)}
    return found


def _count(skeleton: Skeleton, config: PTuningConfig) -> Counted:
    width = embedded(skeleton)
    made = "" if config.encoder == "none" else f", made by an {config.encoder.upper()} of {config.hidden_size or width}"
    return Counted(
        {name: prod(shape) for name, shape in shapes(config, width).items()},
        f"{config.num_virtual_tokens} virtual tokens of {width}{made}",
    )


def _attach(model: nn.Module, config: PTuningConfig) -> Attachment:
    from peftctl.methods.p_tuning.delta import attach

    return attach(model, config)


def _exchange() -> Exchange:
    from peftctl.methods.p_tuning.peft import EXCHANGE

    return EXCHANGE


METHOD = Method(
    name="p-tuning",
    summary="embeddings before those of the tokens, made by a trained encoder",
    paper="https://arxiv.org/abs/2103.10385",
    config=PTuningConfig,
    traits=lambda config: Traits(starts_as_identity=False, foldable=False, virtual_tokens=config.num_virtual_tokens),
    count=_count,
    attach=_attach,
    exchange=_exchange,
)
