"""The load-balancing loss of a mixture of experts, over the real tokens of the passes that were heard.

https://arxiv.org/abs/2101.03961, equations 4 to 6, over all layers at once, as transformers' models have it: the number
of experts times the sum over them of the share of the choices that fall on one and its mean probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftctl.errors import ModelError
from peftctl.surgery import device_of

KEY = "output_router_logits"
ASKED = {KEY: True}


class Balance:
    """What the routers of a model said in passes with gradients, until `loss` is asked for."""

    def __init__(self, coefficient: float, chosen: int) -> None:
        self.coefficient = coefficient
        self.chosen = chosen  # experts that a token goes to
        self._heard: list[tuple[Sequence[Tensor], Tensor]] = []

    def hear(self, output: Any, counts: Tensor) -> None:
        """Keep what the trunk answered; `counts` (tokens,): how often each token is to count."""
        self._heard.append((output.router_logits, counts))

    def loss(self) -> Tensor:
        """Of everything heard since it was last asked for, a scalar: `chosen` where all experts are used alike."""
        heard, self._heard = self._heard, []
        return load_balance(
            [logits for layers, _ in heard for logits in layers],
            [counts for layers, counts in heard for _ in layers],
            self.chosen,
        )


def load_balance(logits: Sequence[Tensor], counts: Sequence[Tensor], chosen: int) -> Tensor:
    """Of some layers' router logits, (tokens, experts) each, with how often each token counts, (tokens,)."""
    used, likely, total = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for own, count in zip(logits, counts, strict=True):
        probabilities = own.float().softmax(-1)
        places = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(chosen, dim=-1).indices, 1.0)
        weight = count.to(probabilities.dtype)
        used = used.to(weight.device) + weight @ places
        likely = likely.to(weight.device) + weight @ probabilities
        total = total.to(weight.device) + weight.sum()
    return len(used) * (used / total * (likely / total)).sum()


@torch.no_grad()
def balance_of(model: Any, coefficient: float | None) -> Balance | None:
    """How a model's experts are balanced, None where they are not: by the coefficient, or by what its config says.

    Raises ModelError where that cannot be, which a trial pass tells.
    """
    config = model.config.get_text_config()
    if coefficient is None:
        coefficient = getattr(config, "router_aux_loss_coef", None) if getattr(config, KEY, False) else 0.0
    if not coefficient:
        return None
    chosen = getattr(config, "num_experts_per_tok", None)
    if not isinstance(chosen, int) or not _heard(model):
        raise ModelError(
            f"train.router_loss: {type(model).__name__} does not tell how its routers choose, so their loss cannot be "
            "known; set it to 0"
        )
    return Balance(float(coefficient), chosen)


def _heard(model: Any) -> bool:
    """Whether the trunk answers with its routers' logits, one row a token."""
    if model.config.is_encoder_decoder:
        return False
    ids = torch.arange(1, 6, device=device_of(model))[None]
    try:
        found: Any = getattr(model.base_model(input_ids=ids, **ASKED), "router_logits", None)
    except TypeError:  # no such argument
        return False
    return bool(found) and all(isinstance(own, Tensor) and own.ndim == 2 and len(own) == ids.numel() for own in found)
