"""Low-rank adapters in the GGUF form that llama.cpp loads with --lora.

https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py draws the same map from peft's files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from peftctl.errors import InputError
from peftctl.methods._peft import PREFIX
from peftctl.methods.base import MethodConfig
from peftctl.methods.lora import LoraConfig
from peftctl.methods.lora.places import places
from peftctl.skeleton import Skeleton

if TYPE_CHECKING:
    from torch import Tensor

NOTE = "load it with llama.cpp's --lora, on a base that its own converter made"
# model_type -> llama.cpp's architecture
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}


def write(path: Path, config: MethodConfig, skeleton: Skeleton, stored: Mapping[str, Tensor], name: str) -> None:
    """Write one file; `stored` are the tensors in peft's form, `name` the adapter's. Raises InputError, OSError."""
    import gguf

    scales = _scales(config, skeleton)
    products = {
        _target(module, skeleton): (
            stored[f"{PREFIX}{module}.lora_A.weight"],
            stored[f"{PREFIX}{module}.lora_B.weight"],
            scale,
        )
        for module, scale in scales.items()
    }
    # llama.cpp scales by one alpha over each product's own rank: the commonest, and B makes up for another
    (alpha, _), *_ = Counter(scale * len(a) for a, _, scale in products.values()).most_common()
    writer = gguf.GGUFWriter(path, ARCHITECTURES[skeleton.model_type])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for target, (a, b, scale) in products.items():
        b = b.float() * (scale * len(a) / alpha)
        writer.add_tensor(f"{target}.weight.lora_a", a.detach().float().contiguous().numpy())
        writer.add_tensor(f"{target}.weight.lora_b", _rows(b.detach(), target, skeleton).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _scales(config: MethodConfig, skeleton: Skeleton) -> dict[str, float]:
    """What each module's product is multiplied by. Raises InputError for what the form has no place for."""
    if skeleton.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"llama.cpp's form of {skeleton.architecture} is not known here; those of {known} are")
    if not isinstance(config, LoraConfig):
        raise InputError(f"llama.cpp loads lora adapters alone, not {config.name}")
    if config.save_modules or config.bias != "none":
        also = "saved modules" if config.save_modules else "biases"
        raise InputError(f"llama.cpp's form of a lora adapter has no place for {also}")
    return {place.module.path: place.scale for place in places(skeleton, config).places}


def _target(module: str, skeleton: Skeleton) -> str:
    """llama.cpp's name of a module. Raises InputError where it has none."""
    import gguf

    wanted = ARCHITECTURES[skeleton.model_type]
    architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)
    target = gguf.get_tensor_name_map(architecture, skeleton.dimensions.layers).get_name(module)
    if target is None or module not in {m.path for m in skeleton.modules if m.kind == "Linear"}:
        raise InputError(f"llama.cpp's form of a lora adapter has no place for {module}")
    if f"{module}.weight" in skeleton.tied:
        raise InputError(f"{module} shares its weight with the embedding, and llama.cpp has no {target} to change")
    return str(target)


def _rows(b: Tensor, target: str, skeleton: Skeleton) -> Tensor:
    """B with its rows as llama.cpp has them: the llama architecture turns neighbours, not halves, of a head."""
    size = skeleton.dimensions
    heads = {"attn_q": size.heads, "attn_k": size.kv_heads}.get(target.rpartition(".")[2])
    if ARCHITECTURES[skeleton.model_type] != "llama" or heads is None:
        return b
    return b.reshape(heads, 2, -1, b.shape[-1]).swapaxes(1, 2).reshape(b.shape)
