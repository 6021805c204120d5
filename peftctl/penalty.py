"""A method's own penalty, beside whatever objective it is trained for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from peftctl.batch import Batch
from peftctl.methods.attachment import Attachment
from peftctl.objectives.base import Answers, Loss, Objective, Term


def penalised(objective: Objective[Any], attachment: Attachment) -> Objective[Any]:
    """The objective with the attachment's penalty as one more term; itself where there is none.

    The term of a micro-batch is its share of the step's first weight, so that the step has the penalty once however it
    is cut. Without gradients it counts nothing: a loss on held-out rows stays comparable.
    """
    if attachment.penalty() is None:
        return objective

    def weights(batch: Batch, config: Any) -> tuple[float, ...]:
        own = objective.weights(batch, config)
        return (*own, own[0])

    def loss(policy: Answers, reference: Answers | None, batch: Batch, config: Any, *shared: Any) -> Loss:
        found = objective.loss(policy, reference, batch, config, *shared)
        weight, penalty = objective.weights(batch, config)[0], attachment.penalty()
        if penalty is None or not torch.is_grad_enabled():
            return found._replace(terms=(*found.terms, Term(torch.zeros((), device=batch.ids.device))))
        metric = (penalty.detach(), torch.ones_like(penalty.detach()))
        return found._replace(terms=(*found.terms, Term(penalty * weight)), metrics=found.metrics | {"penalty": metric})

    return replace(objective, weights=weights, loss=loss)
