"""Modules that run with trained copies of their weights, tied ones with the same copy at each place."""

from __future__ import annotations

from torch import nn

from peftctl import surgery
from peftctl.methods._copies import Copies
from peftctl.methods.attachment import Attachment, Injected
from peftctl.methods.full import FullConfig, weights
from peftctl.skeleton import dotted


def attach(model: nn.Module, config: FullConfig) -> Attachment:
    found = weights(surgery.skeleton(model), config)
    copies: dict[str, Copies] = {}  # in the order of the modules, so that a tied one's first place comes first
    for path, trained in found.items():
        elsewhere = {}
        for name, full in trained.items():
            if full != dotted(path, name):
                first, _, there = full.rpartition(".")
                elsewhere[name] = (copies[first], there)
        copies[path] = Copies(surgery.find(model, path), found.own(path), elsewhere)
    return Attachment([Injected(path, delta) for path, delta in copies.items()])
