"""Products beside the weights of experts, which are parameters of three dimensions and no linears."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from peftctl.kernels.sums import Sum
from peftctl.methods.attachment import Delta

if TYPE_CHECKING:
    from peftctl.methods.lora.delta import LowRank

# transformers' own ways of computing experts whose products a sum can serve; others want the weight as it is
SERVED = (None, "eager", "grouped_mm", "batched_mm")


class LowRankExperts(Delta):
    """One product an expert beside each chosen parameter of a module, each a child named after its parameter."""

    stands_in = True

    def __init__(self, products: Mapping[str, LowRank]) -> None:
        super().__init__()
        for name, product in products.items():
            self.add_module(name, product)

    def tensors(self) -> dict[str, Tensor]:
        return self.state_dict(keep_vars=True)

    def stand_ins(self, module: nn.Module) -> dict[str, Tensor]:
        sums = {name: self._sum(name, module.get_parameter(name)) for name in self.folds()}
        way = getattr(getattr(module, "config", None), "_experts_implementation", None)
        return dict(sums) if way in SERVED else {name: own.plain() for name, own in sums.items()}

    def _sum(self, name: str, weight: Tensor) -> Sum:
        product: LowRank = self.get_submodule(name)  # type: ignore[assignment]
        a, b = product.factors()
        thin = (b, a) if product.module.kind == "Experts" else (a.mT, b.mT)
        return Sum(weight, *thin, product.scale)

    def folds(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.named_children())

    def fold(self, name: str, weight: Tensor) -> Tensor:
        if name not in self.folds():
            return weight
        own, folded = self._sum(name, weight), weight.float().clone()
        for index, expert in enumerate(folded):  # one by one: all their changes together are as large as the weight
            left, right = own.left[index].float(), own.right[index].float()
            expert += (left @ right * own.scale).to(expert.device)
        return folded
