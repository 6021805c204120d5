"""GGUF adapters against the maps by which transformers reads GGUF models: names, and the order of a head's rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from peftctl import methods
from peftctl.errors import InputError
from peftctl.formats import peft
from peftctl.formats.gguf_adapter import ARCHITECTURES, write
from peftctl.methods.attachment import Attachment
from peftctl.surgery import skeleton
from tests.methods import contract
from tests.models import tiny

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"rank": 4},
    "stabilised": {"rank": 4, "alpha": 6.0, "rank_stabilized": True},
    "patterns": {"rank": 4, "alpha": 6.0, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 1.5}},
    "pissa": {"rank": 3, "init": "pissa"},
    "some": {"rank": 2, "target_modules": ["o_proj", "down_proj"], "layers": [1]},
}


def written(path: Path, name: str, **keys: Any) -> Attachment:
    config = contract.config("lora", **keys)
    model, attachment = contract.attached(config, name)
    contract.disturb(attachment)
    table = skeleton(model)
    _, stored = peft.as_peft(methods.get("lora"), config, table, attachment.tensors())
    write(path, config, table, stored, "N")
    return attachment


def changes(path: Path, name: str) -> dict[str, Tensor]:
    """What llama.cpp adds to each weight, under transformers' names and in its order."""
    reader, model = gguf.GGUFReader(path), tiny(name)
    architecture = reader.fields["general.architecture"].contents()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    names = get_gguf_hf_weights_map(model, processor, model_type=architecture)
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    result = {}
    for name_a in (key for key in found if key.endswith(".lora_a")):
        target = name_a.removesuffix(".lora_a")
        a, b = found[name_a], found[f"{target}.lora_b"]
        change = (b @ a) * (alpha / len(a))
        weight = processor.process(change, target)
        result[names[target]] = torch.from_numpy(weight.weights.copy())
    assert len(found) == 2 * len(result)
    return result


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3"])
def test_llama_cpp_adds_what_folding_adds(name: str, variant: str, tmp_path: Path) -> None:
    attachment = written(tmp_path / "a.gguf", name, **VARIANTS[variant])
    found = changes(tmp_path / "a.gguf", name)
    expected = {}
    for path, delta in attachment.named_deltas():
        zero = torch.zeros_like(tiny(name).get_parameter(f"{path}.weight"))
        expected[f"{path}.weight"] = delta.fold("weight", zero).detach()
    assert set(found) == set(expected)
    for key, change in expected.items():
        torch.testing.assert_close(found[key], change, rtol=1e-5, atol=1e-6)


def test_the_header_says_what_it_is(tmp_path: Path) -> None:
    written(tmp_path / "a.gguf", "llama", rank=4, alpha=6.0)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    said = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert said == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "N",
        "general.file_type": 0,
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
    }
    assert {tensor.name for tensor in reader.tensors} >= {"blk.0.attn_q.weight.lora_a", "blk.1.ffn_down.weight.lora_b"}


def test_every_architecture_is_one_of_llama_cpps() -> None:
    assert set(ARCHITECTURES.values()) <= set(gguf.MODEL_ARCH_NAMES.values())


@pytest.mark.parametrize(
    ("model", "keys", "says"),
    [
        ("gpt2", {"name": "lora"}, "llama.cpp's form of GPT2LMHeadModel is not known here"),
        ("llama", {"name": "dora"}, "loads lora adapters alone, not dora"),
        ("llama", {"name": "bottleneck"}, "loads lora adapters alone, not bottleneck"),
        ("llama", {"name": "lora", "save_modules": ["norm"]}, "no place for saved modules"),
        ("llama", {"name": "lora", "bias": "all"}, "no place for biases"),
        ("llama", {"name": "lora", "target_modules": ["embed_tokens"]}, "no place for model.embed_tokens"),
        ("gemma", {"name": "lora", "target_modules": ["lm_head"]}, "no place for lm_head"),
    ],
)
def test_what_has_no_place_is_refused(model: str, keys: dict[str, Any], says: str, tmp_path: Path) -> None:
    stored: dict[str, Tensor] = {}
    config = contract.config(**keys)
    if "target_modules" in keys:
        base, attachment = contract.attached(config, model)
        _, stored = peft.as_peft(methods.get("lora"), config, skeleton(base), attachment.tensors())
    with pytest.raises(InputError, match=says):
        write(tmp_path / "a.gguf", config, skeleton(tiny(model)), stored, "N")
    assert not list(tmp_path.iterdir())


def test_a_head_that_is_the_embedding_is_refused(tmp_path: Path) -> None:
    config = contract.config("lora", target_modules=["lm_head"])
    model, attachment = contract.attached(config, "llama")
    table = skeleton(model)
    _, stored = peft.as_peft(methods.get("lora"), config, table, attachment.tensors())
    tied = table._replace(tied={"lm_head.weight": "model.embed_tokens.weight"})
    with pytest.raises(InputError, match="lm_head shares its weight with the embedding"):
        write(tmp_path / "a.gguf", config, tied, stored, "N")
    write(tmp_path / "a.gguf", config, table, stored, "N")
    assert list(changes(tmp_path / "a.gguf", "llama")) == ["lm_head.weight"]
