"""A GGUF file as a plain Hugging Face folder: dequantised once, so that everything else reads safetensors.

What only asks for its architecture gets that from the header.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftctl.errors import ModelError
from peftctl.storage import TEMPORARY, publish


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file to `folder`, in bfloat16, whole or not at all. Raises ModelError."""
    import torch

    temporary = folder.with_name(f"{TEMPORARY}{os.getpid()}-{folder.name}")  # two commands may convert at once
    temporary.mkdir(parents=True)
    try:
        model, tokenizer = _read(gguf)
        unmarked(model).to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def architecture(gguf: Path) -> str:
    """The config.json that the header of a GGUF file means; no weight is read. Raises ModelError."""
    from transformers import AutoConfig

    with _reading(gguf) as place:
        config: Any = AutoConfig.from_pretrained(**place)
        text: str = config.to_json_string()
        return text


def _read(gguf: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _reading(gguf) as place:
        model = AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **place)
        return model, AutoTokenizer.from_pretrained(**place)


@contextmanager
def _reading(gguf: Path) -> Iterator[dict[str, Any]]:
    """How a file is named to transformers, whose complaints about it become one line."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield {
            "pretrained_model_name_or_path": str(gguf.parent),
            "gguf_file": gguf.name,
            "local_files_only": True,
        }
    except (ValueError, KeyError, IndexError, TypeError, OSError, RuntimeError, struct.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{gguf} cannot be read as a GGUF model: {reason}") from None


def unmarked(model: Any) -> Any:
    """Without the marks of quantisation: the weights are plain by now, but saving would be refused."""
    for name in ("quantization_config", "_model_name_or_path"):
        model.config.__dict__.pop(name, None)
    model.hf_quantizer = None
    model.is_quantized = False
    return model
