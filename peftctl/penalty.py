"""What is minimised beside whatever objective there is: a method's own penalty, the loss of a model's routers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from peftctl.batch import Batch
from peftctl.methods.attachment import Attachment
from peftctl.objectives.base import Answers, Loss, Objective, Term
from peftctl.policy import Policy


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


def balanced(objective: Objective[Any], policy: Policy) -> Objective[Any]:
    """The objective with the policy's auxiliary loss as one more term; itself where there is none.

    A micro-batch weighs as many tokens as it has, and the step's loss is the mean over its micro-batches by that
    weight. It is what one batch of them all would give where they choose experts alike; as a product of two means over
    tokens it is not quite that where they do not. Without gradients it counts nothing, as a penalty does.
    """
    if policy.balance is None:
        return objective

    def weights(batch: Batch, config: Any) -> tuple[float, ...]:
        own = objective.weights(batch, config)
        return (*own, float(batch.visited) if any(own) else 0.0)

    def loss(asked: Answers, reference: Answers | None, batch: Batch, config: Any, *shared: Any) -> Loss:
        found = objective.loss(asked, reference, batch, config, *shared)
        if not torch.is_grad_enabled():
            return found._replace(terms=(*found.terms, Term(torch.zeros((), device=batch.ids.device))))
        (term,) = policy.auxiliary(batch)
        metric = (term.sum.detach(), torch.full_like(term.sum.detach(), batch.visited))
        return found._replace(terms=(*found.terms, term), metrics=found.metrics | {"router_loss": metric})

    return replace(objective, weights=weights, loss=loss)
