"""Norms that run with a trained weight and bias. https://arxiv.org/abs/2312.11420"""

from __future__ import annotations

from torch import nn

from peftctl import surgery
from peftctl.methods._copies import Copies
from peftctl.methods.attachment import Attachment, Injected
from peftctl.methods.ln_tuning import LnTuningConfig, norms


def attach(model: nn.Module, config: LnTuningConfig) -> Attachment:
    chosen = norms(surgery.skeleton(model), config).modules
    return Attachment([Injected(m.path, Copies(surgery.find(model, m.path), m.shapes)) for m in chosen])
