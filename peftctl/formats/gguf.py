"""A GGUF file as a plain Hugging Face folder: dequantised once, so that everything else reads safetensors."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from peftctl.errors import ModelError
from peftctl.storage import TEMPORARY


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file to `folder`, in bfloat16, whole or not at all. Raises ModelError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    temporary = folder.with_name(f"{TEMPORARY}{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "local_files_only": True}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        unmarked(model).to(torch.bfloat16).save_pretrained(temporary)
        AutoTokenizer.from_pretrained(**source).save_pretrained(temporary)  # type: ignore[no-untyped-call]
        os.replace(temporary, folder)
    except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"{gguf} cannot be converted: {str(error).splitlines()[0]}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def unmarked(model: Any) -> Any:
    """Without the marks of quantisation: the weights are plain by now, but saving would be refused."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if hasattr(model.config, "_model_name_or_path"):
        model.config._model_name_or_path = None
    model.hf_quantizer = None
    model.is_quantized = False
    return model
