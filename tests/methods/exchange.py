"""The `peft` package as the oracle of adapter files: what we write it computes, what it writes we compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file

from peftctl import methods
from peftctl.methods.base import MethodConfig
from peftctl.skeleton import Skeleton
from peftctl.surgery import skeleton
from tests.methods import contract
from tests.models import logits, tiny


def written(folder: Path, config: MethodConfig, name: str) -> tuple[Skeleton, torch.Tensor]:
    """Write a disturbed adapter as peft has it; the skeleton and our logits."""
    model, attachment = contract.attached(config, name)
    contract.disturb(attachment)
    table = skeleton(model)
    exchange = methods.get(config.name).exchange
    assert exchange is not None
    keys, tensors = exchange().write(config, table, attachment.tensors())
    (folder / "adapter_config.json").write_text(json.dumps(keys | {"base_model_name_or_path": "tiny"}))
    save_file({k: t.detach().clone().contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    return table, contract.answer(model, attachment)


def theirs(folder: Path, name: str) -> torch.Tensor:
    """peft's logits with the adapter in a folder; every tensor of the file must have found its place."""
    model = peft.PeftModel.from_pretrained(tiny(name), folder).eval()
    stored, held = load_file(folder / "adapter_model.safetensors"), peft.get_peft_model_state_dict(model)
    assert all(torch.equal(held[key], stored[key]) for key in held if key in stored)
    return logits(model)


def read(folder: Path, method: str, name: str) -> tuple[MethodConfig, dict[str, torch.Tensor]]:
    """The method block and our tensors of an adapter in a folder."""
    exchange = methods.get(method).exchange
    assert exchange is not None
    keys = json.loads((folder / "adapter_config.json").read_text())
    assert exchange().peft_type == keys["peft_type"] and exchange().claims(keys)
    block, tensors = exchange().read(keys, skeleton(tiny(name)), load_file(folder / "adapter_model.safetensors"))
    return methods.get(method).config(**block), tensors


def ours(folder: Path, method: str, name: str) -> torch.Tensor:
    """Our logits with the adapter in a folder."""
    config, tensors = read(folder, method, name)
    model, attachment = contract.attached(config, name)
    attachment.load(tensors)
    return contract.answer(model, attachment)


def saved_by_peft(folder: Path, config: Any, name: str) -> torch.Tensor:
    """Save an adapter of peft's own, its trained numbers moved; its logits."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(tiny(name), config).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    wrapped.save_pretrained(folder)
    return logits(wrapped)
