"""The low-rank product: y + s B A x. https://arxiv.org/abs/2106.09685"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftctl import surgery
from peftctl.kernels.linear import Product
from peftctl.methods._products import applied, factors, stored, stored_rows
from peftctl.methods.attachment import Attachment, Delta, Injected
from peftctl.methods.lora import LoraConfig
from peftctl.methods.lora.experts import LowRankExperts
from peftctl.methods.lora.places import Place, biases, places
from peftctl.methods.lora.starts import STARTS
from peftctl.skeleton import EXPERTS, Module


class LowRank(Delta):
    """A product beside a weight, or beside some rows of one; less the product that it started from, if it was not 0."""

    adds = True

    a0: Tensor | None
    b0: Tensor | None

    def __init__(self, module: Module, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.module, self.scale, self.dropout = module, scale, dropout
        self.a, self.b = factors(module, rank)
        self.register_buffer("a0", None)
        self.register_buffer("b0", None)

    @torch.no_grad()
    def start(self, kind: str, weight: Tensor) -> None:
        """Begin at a part of the weight (out, in), and take the same away for good: step 0 is the base model."""
        self.a0, self.b0 = torch.empty_like(self.a), torch.empty_like(self.b)
        if weight.is_meta:
            return  # the values are yet to be loaded
        matrices = zip(*(part.view(-1, *part.shape[-2:]) for part in (weight, self.a, self.b)), strict=True)
        for own, a, b in matrices:
            for part, value in zip((a, b), STARTS[kind](own, len(a), self.scale), strict=True):
                part.copy_(value)
        self.a0.copy_(self.a)
        self.b0.copy_(self.b)

    def tensors(self) -> dict[str, Tensor]:
        return self.state_dict(keep_vars=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.change(x)

    def change(self, x: Tensor) -> Tensor:
        return applied(functional.dropout(x, self.dropout, self.training), *self.factors()) * self.scale

    def factors(self) -> tuple[Tensor, Tensor]:
        """The change over the scale as one product.

        B A - B0 A0 as B (A - A0) + (B - B0) A0: the differences are small and taken in the factors' own precision,
        so nothing cancels after rounding, and at the start the change is 0 exactly.
        """
        if self.a0 is None or self.b0 is None:
            return self.a, self.b
        return torch.cat([self.a - self.a0, self.a0], dim=-2), torch.cat([self.b, self.b - self.b0], dim=-1)

    def product(self) -> Product | None:
        return Product(*self.factors(), self.scale, self.dropout)

    def folds(self) -> tuple[str, ...]:
        return ("weight",)

    def fold(self, name: str, weight: Tensor) -> Tensor:
        if name != "weight":
            return weight
        a, b = self.factors()
        return weight.float() + stored((b.float() @ a.float()) * self.scale, self.module, weight)

    def fold_rows(self, name: str, weight: Tensor, first: int) -> Tensor | None:
        return stored_rows(self.factors(), self.scale, self.module, weight, first) if name == "weight" else weight


class LowRankRows(LowRank):
    """The same beside an embedding, whose input are the numbers of its rows; `gain` is what it scales its rows by."""

    def __init__(self, module: Module, rank: int, scale: float, gain: float) -> None:
        super().__init__(module, rank, scale)
        self.gain = gain
        nn.init.zeros_(self.a)  # as in loralib: a row that was never seen stays at 0
        nn.init.normal_(self.b)

    def product(self) -> None:
        return None  # the input are numbers of rows

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        rows = functional.embedding(x, self.a.T.to(y.dtype))
        return y + functional.linear(rows, self.b.to(y.dtype)) * (self.scale * self.gain)


class LowRankParts(Delta):
    """Products beside parts of a fused weight, each a child named after its part; the other outputs stay the base's."""

    adds = True

    def __init__(self, module: Module, parts: Mapping[str, tuple[LowRank, Sequence[int]]]) -> None:
        super().__init__()
        self.module = module
        for name, (part, rows) in parts.items():
            self.add_module(name, part)
            self.register_buffer(f"rows_{name}", torch.tensor(rows), persistent=False)

    def tensors(self) -> dict[str, Tensor]:
        return self.state_dict(keep_vars=True)

    def _parts(self) -> list[tuple[LowRank, Tensor]]:
        return [(part, self.get_buffer(f"rows_{name}")) for name, part in self.named_children()]  # type: ignore[misc]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for part, rows in self._parts():
            y = y.index_add(-1, rows, part.change(x))
        return y

    def product(self) -> Product | None:
        """The parts' products, stacked: A below A, each B in its own rows of columns that are 0 elsewhere."""
        (first, _), *_ = parts = self._parts()
        pairs = [(*part.factors(), rows) for part, rows in parts]
        wide = [b.new_zeros(self.module.out_features, b.shape[1]).index_copy(0, rows, b) for _, b, rows in pairs]
        return Product(torch.cat([a for a, _, _ in pairs]), torch.cat(wide, dim=1), first.scale, first.dropout)

    def folds(self) -> tuple[str, ...]:
        return ("weight",)

    def fold(self, name: str, weight: Tensor) -> Tensor:
        if name != "weight":
            return weight
        folded = weight.float().clone()
        outs = folded if self.module.kind == "Linear" else folded.T
        for part, rows in self._parts():
            a, b = part.factors()
            outs.index_add_(0, rows.to(weight.device), ((b.float() @ a.float()) * part.scale).to(weight.device))
        return folded


class Bias(Delta):
    """A trained copy of a bias, in its place. The copy is what is saved, as in peft's files."""

    adds = True

    def __init__(self, bias: nn.Parameter) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach().float().clone())
        self.base = (bias,)  # behind a tuple, so that it is not part of the delta

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + (self.bias - self.base[0]).to(y.dtype)  # 0 exactly at the start

    def folds(self) -> tuple[str, ...]:
        return ("bias",)

    def fold(self, name: str, weight: Tensor) -> Tensor:
        return self.bias.detach().float().to(weight.device) if name == "bias" else weight


class LoraAttachment(Attachment):
    """With a learning rate of B's own. https://arxiv.org/abs/2402.12354"""

    def __init__(self, found: Sequence[Injected], lr_ratio: float) -> None:
        super().__init__(found)
        self.lr_ratio = lr_ratio

    def groups(self) -> dict[str, float]:
        if self.lr_ratio == 1:
            return {}
        # of an embedding, B is not what starts at 0
        rows = {path for path, delta, _ in self.places if isinstance(delta, LowRankRows)}
        names = (name.rpartition(".") for name in self.trainable())
        return {f"{path}.{last}": self.lr_ratio for path, _, last in names if last == "b" and path not in rows}


def attach(model: nn.Module, config: LoraConfig) -> Attachment:
    table = surgery.skeleton(model)
    chosen = places(table, config).places
    apart = [place for place in chosen if place.module.kind not in EXPERTS]
    found = [Injected(p.module.path, _delta(surgery.find(model, p.module.path), p, config)) for p in apart]
    found += _experts(model, [place for place in chosen if place.module.kind in EXPERTS], config)
    for module in biases(table, config.bias, chosen):
        found.append(Injected(module.path, Bias(surgery.find(model, module.path).get_parameter("bias"))))
    return LoraAttachment(found, config.lr_ratio)


def _delta(module: nn.Module, place: Place, config: LoraConfig) -> Delta:
    description = place.module
    if description.kind == "Embedding":
        return LowRankRows(description, place.rank, place.scale, surgery.embed_scale(module))
    weight = surgery.out_in(module, module.get_parameter("weight").detach())
    if not place.parts:
        return _low_rank(description, weight, place, config)
    parts = {}
    for name, rows in place.parts.items():
        own = Module(f"{description.path}.{name}", "Linear", "", {"weight": (len(rows), description.in_features)})
        parts[name] = (_low_rank(own, weight[list(rows)], place, config), rows)
    return LowRankParts(description, parts)


def _experts(model: nn.Module, chosen: Sequence[Place], config: LoraConfig) -> list[Injected]:
    """One delta a module of experts, with a product for each of its chosen parameters."""
    found: dict[str, dict[str, LowRank]] = {}
    for place in chosen:
        path, _, name = place.module.path.rpartition(".")
        weight = surgery.find(model, path).get_parameter(name).detach()
        weight = weight if place.module.kind == "Experts" else weight.mT
        found.setdefault(path, {})[name] = _low_rank(place.module, weight, place, config)
    return [Injected(path, LowRankExperts(products)) for path, products in found.items()]


def _low_rank(description: Module, weight: Tensor, place: Place, config: LoraConfig) -> LowRank:
    delta = LowRank(description, place.rank, place.scale, config.dropout)
    if config.init != "default":
        delta.start(config.init, weight)
    delta.a.requires_grad_(config.train_a)
    return delta
