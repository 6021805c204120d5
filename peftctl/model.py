"""Loading a base: its weights, or only its skeleton. The only importer of transformers' Auto classes."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftctl.base import Base, cache_folder
from peftctl.errors import ModelError
from peftctl.skeleton import Dimensions, Module, Skeleton

if TYPE_CHECKING:
    import torch


def load(base: Base, dtype: str, device: str, seed: int, *, trust_remote_code: bool = False) -> Any:
    """The frozen model in eval mode on a device. Raises ModelError when the weights do not fit the architecture."""
    from peftctl.surgery import frozen

    _quiet()
    wanted = _dtype(dtype, device)
    model = _random(base, wanted, seed) if base.weights is None else _stored(base, wanted, trust_remote_code)
    return frozen(model).to(device).eval()


def device(name: str) -> str:
    """The device that `auto` means: CUDA, then MPS, then CPU. Raises ModelError when a named one is not there."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(kind for kind, usable in there.items() if usable)
    if not there.get(name.split(":")[0], False):
        usable = ", ".join(kind for kind, yes in there.items() if yes)
        raise ModelError(f"train.device: {name!r} is not on this machine; there is: {usable}")
    return name


def skeleton(base: Base, *, trust_remote_code: bool = False) -> Skeleton:
    """The module table of a base, without its weights; kept under the config's hash, so asking again is instant."""
    path = cache_folder() / "skeletons" / f"{_key(base)}.json"
    kept = _kept(path)
    if kept is not None:
        return kept
    table = _meta(base, trust_remote_code)
    with suppress(OSError):  # a cache that cannot be written costs time, no more
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(_write(table)), "utf-8")
        temporary.replace(path)
    return table


def _kept(path: Path) -> Skeleton | None:
    """The table in a cache file; None where there is none, or a damaged one."""
    try:
        return _read(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _key(base: Base) -> str:
    return hashlib.sha256(base.config.read_bytes() + f"|1|{version('transformers')}".encode()).hexdigest()[:24]


def _write(table: Skeleton) -> dict[str, Any]:
    return table._asdict() | {"dimensions": table.dimensions._asdict(), "modules": [list(m) for m in table.modules]}


def _read(stored: dict[str, Any]) -> Skeleton:
    modules = tuple(Module(p, k, t, {n: tuple(s) for n, s in shapes.items()}) for p, k, t, shapes in stored["modules"])
    return Skeleton(**(stored | {"modules": modules, "dimensions": Dimensions(**stored["dimensions"])}))


def _quiet() -> None:
    """Warnings about what is not a problem here, and bars beside ours, help nobody."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _dtype(name: str, device: str) -> torch.dtype | str:
    import torch

    if name == "auto":
        return "auto"
    wanted: torch.dtype = getattr(torch, name)
    # half precision has no fast or complete kernels there
    return torch.float32 if wanted is torch.float16 and device == "cpu" else wanted


def _config(base: Base, trust_remote_code: bool) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    settings = base.settings()
    try:
        if trust_remote_code and base.weights is not None:
            return AutoConfig.from_pretrained(base.weights, trust_remote_code=True)
        return AutoConfig.for_model(**settings)
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        raise ModelError(f"{base.name}: transformers {version('transformers')} cannot use its config: {said}") from None


def _from_config(base: Base, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    config = _config(base, trust_remote_code)
    try:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ModelError(f"{base.name} ({config.model_type}) cannot be built: {_line(error)}") from None


def empty(base: Base, *, trust_remote_code: bool = False) -> Any:
    """The model on the meta device: its modules and shapes, no memory for weights."""
    import torch

    _quiet()
    with torch.device("meta"):
        return _from_config(base, trust_remote_code)


def _meta(base: Base, trust_remote_code: bool) -> Skeleton:
    from peftctl.surgery import skeleton as table_of

    return table_of(empty(base, trust_remote_code=trust_remote_code))


def _random(base: Base, dtype: torch.dtype | str, seed: int) -> Any:
    import torch

    torch.manual_seed(seed)
    model = _from_config(base, False)
    return model.to(torch.float32 if dtype == "auto" else dtype)


def _stored(base: Base, dtype: torch.dtype | str, trust_remote_code: bool) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            base.weights,
            config=_config(base, trust_remote_code),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{base.name} cannot be loaded: {_line(error)}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{base.name} lacks {len(missing)} tensors of its architecture: {', '.join(missing[:5])}")
    return model


def _line(error: Exception) -> str:
    said = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    unserved = said.startswith("Unrecognized configuration class")
    return "it is no causal language model, and others are not served" if unserved else said
