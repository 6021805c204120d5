"""A skeleton table written by hand, for what must work without torch."""

from __future__ import annotations

from peftctl.skeleton import Dimensions, Module, Skeleton


def _linear(path: str, out: int, into: int) -> Module:
    return Module(path, "Linear", "Linear", {"weight": (out, into)})


def _block(path: str) -> list[Module]:
    return [
        Module(path, "LlamaDecoderLayer", "LlamaDecoderLayer", {}),
        *(_linear(f"{path}.self_attn.{n}_proj", out, 32) for n, out in (("q", 32), ("k", 16), ("v", 16), ("o", 32))),
        *(_linear(f"{path}.mlp.{n}_proj", 64, 32) for n in ("gate", "up")),
        _linear(f"{path}.mlp.down_proj", 32, 64),
        *(
            Module(f"{path}.{n}_layernorm", "Norm", "LlamaRMSNorm", {"weight": (32,)})
            for n in ("input", "post_attention")
        ),
    ]


LLAMA = Skeleton(
    architecture="LlamaForCausalLM",
    model_type="llama",
    modules=(
        Module("model.embed_tokens", "Embedding", "Embedding", {"weight": (128, 32)}),
        Module("model.layers", "ModuleList", "ModuleList", {}),
        *_block("model.layers.0"),
        *_block("model.layers.1"),
        Module("model.norm", "Norm", "LlamaRMSNorm", {"weight": (32,)}),
        _linear("lm_head", 128, 32),
    ),
    tied={},
    head="lm_head",
    dimensions=Dimensions(layers=2, hidden=32, heads=4, kv_heads=2, head_dim=8, vocabulary=128),
)
