"""Attaching a method to a model, whatever the method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftctl import model as models
from peftctl.base import Base
from peftctl.methods._added import added, refuse_rewrites
from peftctl.methods._copies import copied
from peftctl.methods.attachment import Attachment
from peftctl.methods.base import Method, MethodConfig
from peftctl.methods.whole import saved, whole
from peftctl.skeleton import Skeleton, dotted
from peftctl.surgery import device_of, skeleton

if TYPE_CHECKING:
    from peftctl.formats.peft import Adapter


def attach(model: nn.Module, method: Method[Any], config: MethodConfig, seed: int) -> Attachment:
    """The method's deltas, hung on the model. Seeded here, so that the start is a function of recipe and base alone."""
    torch.manual_seed(seed)
    attachment = deltas(model, method, config)
    attachment.to(device_of(model))
    attachment.install(model)
    return attachment


def deltas(model: nn.Module, method: Method[Any], config: MethodConfig) -> Attachment:
    """The method's deltas, copies of the saved modules and a task's head, not yet hung on anything. TargetError."""
    attachment, table = method.attach(model, config), skeleton(model)
    if config.save_modules is not None:
        attachment.extend(copied(model, saved(table, config.save_modules, attachment.paths)))
    by_method = attachment.places
    if table.rows is not None:
        attachment.extend(added(model, {path for path, delta, _ in by_method if delta.stands_in}), first=True)
        refuse_rewrites(by_method, set(table.vocabulary))
    if table.added:
        attachment.extend(copied(model, whole(table.added)))
    return attachment


def filled(model: nn.Module, adapter: Adapter) -> Attachment:
    """An adapter's deltas with their values, beside a model without weights."""
    attachment = deltas(model, adapter.method, adapter.config)
    for module in attachment.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.is_meta for tensor in own):
            module.to_empty(device="cpu", recurse=False)
    attachment.load(adapter.tensors, str(adapter.folder))
    return attachment


def possible(base: Base, method: Method[Any], config: MethodConfig, *, trust_remote_code: bool = False) -> None:
    """Refuse what attaching would refuse, before a weight is read. Raises TargetError."""
    with torch.device("meta"):
        deltas(models.empty(base, trust_remote_code=trust_remote_code), method, config)


def fit(
    base: Base,
    method: Method[Any],
    config: MethodConfig,
    tensors: Mapping[str, Tensor],
    origin: str,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Refuse an adapter's values that do not belong on this base, before a weight is read. Raises FormatError."""
    with torch.device("meta"):
        model = models.empty(base, trust_remote_code=trust_remote_code)
        attachment = deltas(model, method, config)
    attachment.fit(with_head(tensors, attachment, skeleton(model)), origin)


def with_head(tensors: Mapping[str, Tensor], attachment: Attachment, table: Skeleton) -> Mapping[str, Tensor]:
    """An adapter's values; of one that was trained without a head, or without new tokens, these stay as drawn."""
    head = {dotted(module.path, name) for module in table.added for name in module.shapes}
    rows = {dotted(path, name) for path in table.vocabulary for name in ("rows", "row_bias")}
    lacking = [names for names in (head, rows) if not any(name in names for name in tensors)]
    own = {name: tensor for name, tensor in attachment.tensors().items() if any(name in names for names in lacking)}
    return own | dict(tensors)
