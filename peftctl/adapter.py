"""Attaching a method to a model, whatever the method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftctl.methods.attachment import Attachment
from peftctl.methods.base import Method, MethodConfig
from peftctl.surgery import device_of


def attach(model: nn.Module, method: Method[Any], config: MethodConfig, seed: int) -> Attachment:
    """The method's deltas, hung on the model. Seeded here, so that the start is a function of recipe and base alone."""
    torch.manual_seed(seed)
    attachment = method.attach(model, config)
    attachment.to(device_of(model))
    attachment.install(model)
    return attachment


def restore(attachment: Attachment, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Put saved tensors in. Raises FormatError when they do not fit."""
    attachment.load(tensors, origin)
