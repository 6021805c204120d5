"""Modules that run with trained copies of their weights."""

from __future__ import annotations

from torch import nn

from peftctl import surgery
from peftctl.methods._copies import copied
from peftctl.methods.attachment import Attachment
from peftctl.methods.full import FullConfig, weights


def attach(model: nn.Module, config: FullConfig) -> Attachment:
    return Attachment(copied(model, weights(surgery.skeleton(model), config)))
