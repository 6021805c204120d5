"""The prefix: one row of keys and values for each virtual token. https://arxiv.org/abs/2101.00190"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftctl import surgery
from peftctl.errors import Unfoldable
from peftctl.methods.attachment import Attachment, Delta, Virtual
from peftctl.methods.prefix import PrefixConfig, attentions, cached, shapes
from peftctl.skeleton import Dimensions


class Prefix(Delta):
    """(tokens, 2 * layers * width), trained as it is, or as what an embedding and an MLP make (section 4.3)."""

    def __init__(self, sizes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        if "prompt" in sizes:
            self.prompt = nn.Parameter(torch.randn(sizes["prompt"]))
            return
        self.embedding = nn.Parameter(torch.randn(sizes["embedding"]))
        self.first = _linear(sizes["first.weight"])
        self.second = _linear(sizes["second.weight"])

    def rows(self) -> Tensor:
        return project(self.tensors())

    def fold(self, name: str, weight: Tensor) -> Tensor:
        raise Unfoldable("a prefix is keys and values of its own, which no weight of the base can hold")


def _linear(shape: tuple[int, ...]) -> nn.Linear:
    return nn.Linear(shape[1], shape[0])


def project(tensors: Mapping[str, Tensor]) -> Tensor:
    """What the saved tensors come to: (tokens, 2 * layers * width)."""
    if "prompt" in tensors:
        return tensors["prompt"]
    middle = functional.linear(tensors["embedding"], tensors["first.weight"], tensors["first.bias"])
    return functional.linear(torch.tanh(middle), tensors["second.weight"], tensors["second.bias"])


class PrefixAttachment(Attachment):
    """Nothing hangs on a module: the policy lays the virtual tokens before the real ones."""

    shared: Prefix

    def __init__(self, prefix: Prefix, size: Dimensions, dtype: torch.dtype, places: tuple[str, ...]) -> None:
        super().__init__(shared=prefix)
        self.size, self.dtype, self.attentions = size, dtype, places

    def virtual(self) -> Virtual | None:
        if not self.shared.enabled:
            return None
        rows = self.shared.rows().to(self.dtype)
        # (tokens, 2 * layers, heads, width of a head) -> 2 * layers of (heads, tokens, width); keys at the even places
        layers = rows.view(len(rows), 2 * self.size.layers, self.size.kv_heads, self.size.head_dim)
        parts = layers.permute(1, 2, 0, 3).unbind()
        return Virtual(len(rows), keys=parts[0::2], values=parts[1::2], paths=self.attentions)


def attach(model: nn.Module, config: PrefixConfig) -> Attachment:
    table = surgery.skeleton(model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    sizes, places = shapes(table, config), tuple[str, ...]()
    if table.dimensions.encoder_layers:
        places = tuple(block.attention[0].path.rpartition(".")[0] for block in attentions(table))
    return PrefixAttachment(Prefix(sizes), cached(table), dtype, places)
