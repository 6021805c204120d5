"""The `peft` package as the oracle of an exchange: each reads what the other wrote, and both compute the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file

from peftctl import methods
from peftctl.methods.base import MethodConfig
from peftctl.surgery import skeleton
from tests.methods import contract
from tests.models import ENCODERS, inputs, logits, tiny


def _theirs(wrapped: Any, name: str) -> torch.Tensor:
    """peft's logits; those of virtual tokens, which it gives as well, are left out."""
    ids = inputs(tiny(name))["input_ids"]
    mask = {} if name in ENCODERS else {"attention_mask": torch.ones_like(ids)}
    return logits(wrapped, **mask)[:, -ids.shape[1] :]


def reads_what_we_wrote(config: MethodConfig, name: str, folder: Path) -> dict[str, Any]:
    """Asserts that peft computes the same from our files; gives their config."""
    model, attachment = contract.attached(config, name)
    contract.disturb(attachment)
    exchange = methods.get(config.name).exchange
    assert exchange is not None
    keys, tensors = exchange().write(config, skeleton(model), attachment.tensors())
    (folder / "adapter_config.json").write_text(json.dumps(keys | {"base_model_name_or_path": "tiny"}))
    plain = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    save_file(plain, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    theirs = peft.PeftModel.from_pretrained(tiny(name), folder).eval()
    torch.testing.assert_close(_theirs(theirs, name), contract.answer(model, attachment), rtol=1e-5, atol=1e-5)
    return keys


def comes_back(config: MethodConfig, name: str, folder: Path) -> None:
    """Asserts that what `reads_what_we_wrote` left in the folder is read as what it was."""
    model, attachment = contract.attached(config, name)
    contract.disturb(attachment)
    expected = contract.answer(model, attachment)
    torch.testing.assert_close(_read(config.name, name, folder), expected, rtol=0, atol=0)


def wrote_what_we_read(theirs: peft.PeftConfig, method: str, name: str, folder: Path) -> None:
    """Asserts that we compute the same from files of peft's own."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(tiny(name), theirs).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    wrapped.save_pretrained(folder)
    expected = _theirs(wrapped, name)
    torch.testing.assert_close(_read(method, name, folder), expected, rtol=1e-5, atol=1e-5)


def _read(method: str, name: str, folder: Path) -> torch.Tensor:
    found = methods.get(method)
    assert found.exchange is not None
    keys = json.loads((folder / "adapter_config.json").read_text())
    block, tensors = found.exchange().read(keys, skeleton(tiny(name)), load_file(folder / "adapter_model.safetensors"))
    model, attachment = contract.attached(found.config(**block), name)
    attachment.load(tensors)
    return contract.answer(model, attachment)
