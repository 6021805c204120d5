"""Prompt tuning: trained embeddings before those of the tokens. https://arxiv.org/abs/2104.08691"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PrivateAttr, model_validator

from peftctl.errors import InputError
from peftctl.methods._prompts import embedded
from peftctl.methods.base import Counted, Exchange, Method, MethodConfig, Traits
from peftctl.skeleton import Skeleton

if TYPE_CHECKING:
    from torch import nn

    from peftctl.methods.attachment import Attachment


class PromptConfig(MethodConfig):
    num_virtual_tokens: int = Field(20, ge=1, description="virtual tokens before the first real one")
    init: Literal["vocabulary", "text", "random"] = Field(
        "vocabulary",
        description="vocabulary: embeddings of tokens drawn at random; text: those of init_text; random: numbers in "
        "[-0.5, 0.5)",
    )
    init_text: str | None = Field(
        None, min_length=1, description="for init: text; its tokens are repeated, or cut, to num_virtual_tokens"
    )
    _ids: tuple[int, ...] = PrivateAttr(())

    @model_validator(mode="after")
    def _one_start(self) -> PromptConfig:
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError("init: text and init_text go together: give both or neither")
        if self.init == "text" and self.init_from is not None:
            raise ValueError("init_from brings its own start, so init: text has no place; leave it out")
        return self

    def tokenized(self, encode: Callable[[str], Sequence[int]]) -> PromptConfig:
        if self.init_text is None:
            return self
        ids, own = encode(self.init_text), self.model_copy()
        if not ids:
            raise InputError(f"method.init_text: {self.init_text!r} has no tokens; give another text")
        own._ids = tuple(islice(cycle(ids), self.num_virtual_tokens))
        return own

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens of `init: text`, one a virtual token; known once the config is `tokenized`."""
        if self.init_text is not None and not self._ids:
            raise InputError("method.init: text has no tokens yet: a tokenizer has to encode it first")
        return self._ids


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
