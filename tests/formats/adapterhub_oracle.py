"""What adapter-hub's own package makes of a base, an adapter and some tokens: run by the python of .venv-adapters.

Its one argument is a JSON file: `base`, `ids` and `jobs`. A job with `load` loads that folder; one with `config` makes
an adapter of random numbers and saves it to `save`. Either way its logits go to `out`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters import AdapterConfig
from safetensors.torch import save_file


def base(folder: str) -> Any:
    architecture = json.loads(Path(folder, "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()
    adapters.init(model)
    return model


def load(model: Any, job: dict[str, Any]) -> None:
    info: dict[str, Any] = {}
    name = model.load_adapter(job["load"], use_safetensors=True, set_active=True, loading_info=info)
    assert name == job["name"] and not info["missing_keys"], info
    # what is not an adapter's own may be left over, its own may not
    assert not [key for key in info["unexpected_keys"] if f".{name}." in key], info


def make(model: Any, job: dict[str, Any]) -> None:
    model.add_adapter(job["name"], config=AdapterConfig.load(job["config"], **job["keys"]), set_active=True)
    torch.manual_seed(5)
    for key, parameter in model.named_parameters():
        if f".{job['name']}." in key:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_adapter(job["save"], job["name"], with_head=False, use_safetensors=True)


@torch.no_grad()
def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    for job in asked["jobs"]:
        model = base(asked["base"])
        load(model, job) if "load" in job else make(model, job)
        logits = model.eval()(input_ids=torch.tensor(asked["ids"])).logits
        save_file({"logits": logits.contiguous()}, job["out"])


main()
