"""Prefix-tuning: trained keys and values before the first token, in every layer. https://arxiv.org/abs/2101.00190"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from peftctl.errors import TargetError
from peftctl.methods._blocks import KEY, Block, every_block
from peftctl.methods.base import Counted, Exchange, Method, MethodConfig, Traits
from peftctl.skeleton import Dimensions, Skeleton

if TYPE_CHECKING:
    from torch import nn

    from peftctl.methods.attachment import Attachment


class PrefixConfig(MethodConfig):
    num_virtual_tokens: int = Field(16, ge=1, description="virtual tokens before the first real one")
    reparametrise: bool = Field(False, description="train an embedding and an MLP that make the keys and values")
    hidden_size: int | None = Field(None, ge=1, description="width of that MLP; null: the width of a layer's keys")

    @model_validator(mode="after")
    def _hidden_size_of_something(self) -> PrefixConfig:
        if self.hidden_size is not None and not self.reparametrise:
            raise ValueError("hidden_size is the width of the reparametrising MLP; set reparametrise: true as well")
        return self


def shapes(skeleton: Skeleton, config: PrefixConfig) -> dict[str, tuple[int, ...]]:
    """The trained tensors. Raises TargetError where layers do not attend over keys and values of one shape."""
    size = cached(skeleton)
    if not all(_attends(skeleton, block) for block in attentions(skeleton)):
        raise TargetError(
            f"method: {skeleton.architecture} does not have keys and values of one shape in every layer, "
            "which prefix needs"
        )
    width = size.kv_heads * size.head_dim
    if not config.reparametrise:
        return {"prompt": (config.num_virtual_tokens, 2 * size.layers * width)}
    middle = config.hidden_size or width
    return {
        "embedding": (config.num_virtual_tokens, width),
        "first.weight": (middle, width),
        "first.bias": (middle,),
        "second.weight": (2 * size.layers * width, middle),
        "second.bias": (2 * size.layers * width,),
    }


def attentions(skeleton: Skeleton) -> tuple[Block, ...]:
    """Every block, once with each of its attentions: of an encoder-decoder, its decoder's blocks have two."""
    return tuple(attending for block in every_block(skeleton) for attending in block.attentions)


def cached(skeleton: Skeleton) -> Dimensions:
    """The dimensions with the heads that a cache holds; Falcon repeats grouped ones for each query before it caches.

    `layers`: of an encoder-decoder, the number of attentions.
    """
    size = skeleton.dimensions
    if size.encoder_layers:
        size = size._replace(layers=len(attentions(skeleton)))
    repeated = skeleton.model_type == "falcon" and size.kv_heads > 1
    return size._replace(kv_heads=size.heads) if repeated else size


def _attends(skeleton: Skeleton, block: Block) -> bool:
    """Whether a block makes keys of the expected width, by a projection of their own or one fused with the query's."""
    size = skeleton.dimensions
    keys = block.named(KEY)
    if keys:
        return [m.out_features for m in keys] == [size.kv_heads * size.head_dim]
    fused = (size.heads + 2 * size.kv_heads) * size.head_dim
    return len(block.attention) == 2 and any(m.out_features == fused for m in block.attention)


def _count(skeleton: Skeleton, config: PrefixConfig) -> Counted:
    size = cached(skeleton)
    what = "attentions" if size.encoder_layers else "layers"
    return Counted(
        {name: prod(shape) for name, shape in shapes(skeleton, config).items()},
        f"{config.num_virtual_tokens} virtual tokens in {size.layers} of {size.layers} {what}, keys and values of "
        f"{size.kv_heads} x {size.head_dim}",
    )


def _attach(model: nn.Module, config: PrefixConfig) -> Attachment:
    from peftctl.methods.prefix.delta import attach

    return attach(model, config)


def _exchange() -> Exchange:
    from peftctl.methods.prefix.peft import EXCHANGE

    return EXCHANGE


METHOD = Method(
    name="prefix",
    summary="trained keys and values before the first token, in every layer",
    paper="https://arxiv.org/abs/2101.00190",
    config=PrefixConfig,
    traits=lambda config: Traits(
        starts_as_identity=False, foldable=False, needs_cache=True, virtual_tokens=config.num_virtual_tokens
    ),
    count=_count,
    attach=_attach,
    exchange=_exchange,
)
