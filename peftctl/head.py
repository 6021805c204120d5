"""The output head of a language model as a function of hidden states: the matrix, and what the family does after it.

Which of the known finishes a model uses is found by comparing with the model's own logits, not by a list of names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peftctl.errors import ModelError
from peftctl.kernels.matrix import matrix, onward
from peftctl.kernels.token_stats import FrozenHead
from peftctl.seq2seq import answered, call, two_sided
from peftctl.surgery import device_of, head_path

Finish = Callable[[Tensor], Tensor]


class Head:
    """Hidden states (n, d) to logits (n, vocabulary). `paths`: the modules of the model that lie inside it."""

    def __init__(self, module: nn.Module, finish: Finish | None, path: str) -> None:
        self.module = module
        self.finish = finish
        self.paths = (path,)
        self.vocabulary: int = module.weight.shape[0]  # type: ignore[assignment,index]
        self.frozen = self.multiplied_by(pack=False)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.module(hidden)
        return logits if self.finish is None else self.finish(logits)

    def multiplied_by(self, pack: bool, exact: bool = False) -> FrozenHead:
        """The same without deltas. `pack`: its matrix in the device's fastest form; `exact`: logits in fp32."""
        weight: Tensor = self.module.weight.detach()  # type: ignore[operator]
        bias: Tensor | None = getattr(self.module, "bias", None)
        wide = None
        if exact and weight.dtype in (torch.bfloat16, torch.float16):
            wide = onward(weight.float(), None if bias is None else bias.float())
        return FrozenHead(matrix(weight, bias, pack=pack), self.finish, wide)


def _finishes(config: Any) -> list[Finish | None]:
    """What families do to the raw logits: nothing, a soft cap (Gemma 2), a multiplier (Cohere), a divisor (Granite)."""
    finishes: list[Finish | None] = [None]
    cap = getattr(config, "final_logit_softcapping", None)
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    if cap:
        finishes.append(lambda logits: torch.tanh(logits / cap) * cap)
    if scale:
        finishes.append(lambda logits: logits * scale)
    if divisor:
        finishes.append(lambda logits: logits / divisor)
    return finishes


def _two_sided(model: Any) -> list[Finish | None]:
    """What encoder-decoders do: T5 with tied embeddings scales by the root of the width, BART adds a vector."""
    finishes: list[Finish | None] = []
    bias, width = getattr(model, "final_logits_bias", None), getattr(model.config, "d_model", None)
    if two_sided(model) and width:
        finishes.append(lambda logits: logits * width**-0.5)
    if two_sided(model) and bias is not None:
        finishes.append(lambda logits: logits + bias[0])
    return finishes


@torch.no_grad()
def head_of(model: Any) -> Head | None:
    """The head of a model, None for one without. Raises ModelError when no known finish gives the model's logits."""
    path = head_path(model)
    if path is None:
        return None
    ids = torch.arange(1, 6, device=device_of(model))[None]
    config = model.config.get_text_config()
    logits, states = answered(model, call(model, ids))
    expected, hidden = logits[0].float(), states[0]
    finishes = [*_finishes(config), *_two_sided(model)]
    heads = [Head(model.get_submodule(path), finish, path) for finish in finishes]
    if hidden.shape[-1] == heads[0].module.weight.shape[1]:  # type: ignore[index]
        # the nearest, not the first that is near: small logits hardly feel a soft cap
        errors = [float((head(hidden).float() - expected).abs().max()) for head in heads]
        if min(errors) <= 1e-2 * float(expected.abs().max()):
            return heads[errors.index(min(errors))]
    raise ModelError(f"the logits of {type(model).__name__} are not its output head's: this head is not supported")
