"""The product P diag(E) Q, kept near a singular value decomposition. https://arxiv.org/abs/2303.10512"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftctl import surgery
from peftctl.kernels.linear import Product
from peftctl.methods._lowrank import targets
from peftctl.methods._products import applied, stored, stored_rows
from peftctl.methods.adalora import AdaloraConfig
from peftctl.methods.adalora.budget import Schedule
from peftctl.methods.attachment import Attachment, Delta, Injected
from peftctl.skeleton import Module

FACTORS = ("a", "b", "e")  # Q, P and E of the paper


class Decomposition(Delta):
    """The factors of one weight, and how important each of their numbers has been: state that is saved as well."""

    adds = True

    keep: Tensor

    def __init__(self, module: Module, config: AdaloraConfig) -> None:
        super().__init__()
        rank = config.first_rank
        self.module, self.scale, self.dropout = module, config.scale, config.dropout
        self.a = nn.Parameter(torch.empty(rank, module.in_features))
        self.b = nn.Parameter(torch.empty(module.out_features, rank))
        self.e = nn.Parameter(torch.zeros(rank))  # zero: step 0 is the base model
        for factor in (self.a, self.b):
            nn.init.normal_(factor, std=0.02)  # as in the authors' code
        self.register_buffer("keep", torch.ones(rank))  # 0 for what the final budget has no room for
        for name in FACTORS:
            self.register_buffer(f"importance_{name}", torch.zeros_like(self.get_parameter(name)))
            self.register_buffer(f"uncertainty_{name}", torch.zeros_like(self.get_parameter(name)))

    def tensors(self) -> dict[str, Tensor]:
        return self.state_dict(keep_vars=True)

    def _scaled(self) -> Tensor:
        return (self.e * self.keep)[:, None] * self.a

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = functional.dropout(x, self.dropout, self.training)
        return y + applied(x, self._scaled(), self.b) * self.scale

    def product(self) -> Product | None:
        return Product(self._scaled(), self.b, self.scale, self.dropout)

    def folds(self) -> tuple[str, ...]:
        return ("weight",)

    def fold(self, name: str, weight: Tensor) -> Tensor:
        if name != "weight":
            return weight
        change = (self.b.float() @ self._scaled().float()) * self.scale
        return weight.float() + stored(change, self.module, weight)

    def fold_rows(self, name: str, weight: Tensor, first: int) -> Tensor | None:
        factors = self._scaled(), self.b
        return stored_rows(factors, self.scale, self.module, weight, first) if name == "weight" else weight

    def deviation(self) -> Tensor:
        """How far both factors are from orthonormal, in the Frobenius norm; a scalar."""
        one = torch.eye(len(self.e), device=self.e.device)
        return (self.a @ self.a.T - one).square().sum().sqrt() + (self.b.T @ self.b - one).square().sum().sqrt()

    @torch.no_grad()
    def observe(self, config: AdaloraConfig) -> None:
        """Smooth the importance |w dL/dw| of each number, and its deviation from that (equations 8 to 10)."""
        for name in FACTORS:
            factor = self.get_parameter(name)
            mean, spread = self.get_buffer(f"importance_{name}"), self.get_buffer(f"uncertainty_{name}")
            now = torch.zeros_like(factor) if factor.grad is None else (factor * factor.grad).abs()
            mean.lerp_(now, 1 - config.importance_beta)
            spread.lerp_((now - mean).abs(), 1 - config.uncertainty_beta)

    def scores(self) -> Tensor:
        """The importance of each triplet (equation 7): its singular value's and the mean of each vector's. (rank,)"""
        a, b, e = (self.get_buffer(f"importance_{n}") * self.get_buffer(f"uncertainty_{n}") for n in FACTORS)
        return e + a.mean(1) + b.mean(0)


class AdaloraAttachment(Attachment):
    """Deals the budget out over all products."""

    def __init__(self, found: Sequence[Injected], config: AdaloraConfig) -> None:
        super().__init__(found)
        self.config = config

    @property
    def decompositions(self) -> list[Decomposition]:
        return [delta for delta in self.deltas if isinstance(delta, Decomposition)]

    def moving(self) -> dict[str, Tensor]:
        kept = {f"{path}.keep": delta.keep for path, delta, _ in self.places if isinstance(delta, Decomposition)}
        return super().moving() | kept

    def penalty(self) -> Tensor | None:
        """The mean deviation of all factors from orthonormal, as in the authors' code, weighted."""
        if self.config.orthogonality == 0 or not self.enabled:
            return None
        found = [delta.deviation() for delta in self.decompositions]
        return torch.stack(found).sum() * (self.config.orthogonality / (2 * len(found)))

    @torch.no_grad()
    def after_backward(self, step: int, total: int) -> None:
        schedule = Schedule.of(self.config, total)
        budget = schedule.budget(step, len(self.decompositions))
        late = step > schedule.end
        if late and int(torch.stack([delta.keep.sum() for delta in self.decompositions]).sum()) <= budget:
            return
        for delta in self.decompositions:
            delta.observe(self.config)
        if late or schedule.prunes(step):  # late: the last pruning's own step was skipped
            self._prune(budget, final=step >= schedule.end)

    def _prune(self, budget: int, final: bool) -> None:
        """Zero the singular values of the least important triplets. They may grow again, unless it is for good."""
        found = self.decompositions
        scores = torch.cat([delta.scores() for delta in found])
        kept = torch.zeros_like(scores)
        kept[scores.argsort(descending=True, stable=True)[:budget]] = 1
        for delta, keep in zip(found, kept.split_with_sizes([len(delta.e) for delta in found]), strict=True):
            delta.e.mul_(keep)
            if final:
                delta.keep.copy_(keep)


def attach(model: nn.Module, config: AdaloraConfig) -> Attachment:
    chosen = targets(surgery.skeleton(model), config, config.first_rank, "method.initial_rank").modules
    return AdaloraAttachment([Injected(m.path, Decomposition(m, config)) for m in chosen], config)
