"""Tiny random models of every architecture the tests speak about, built from configs: no weight is ever downloaded."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 128
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,  # wide, so that attention matters and a leak shows
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DECODER: dict[str, Any] = _COMMON | {"intermediate_size": 64, "max_position_embeddings": 128}
_GROUPED: dict[str, Any] = _DECODER | {"num_key_value_heads": 2, "head_dim": 8}
_GEMMA: dict[str, Any] = _GROUPED | {"sliding_window": 4, "query_pre_attn_scalar": 8}
_BERT: dict[str, Any] = _DECODER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_OLD: dict[str, Any] = {k: v for k, v in _COMMON.items() if k not in ("hidden_size", "num_hidden_layers")}

_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _COMMON | {"n_positions": 128}),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        _COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2, "max_position_embeddings": 128},
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _DECODER | {"rotary_pct": 0.5}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _GROUPED),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _GROUPED),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _GEMMA),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA),
    "mistral": ("MistralConfig", "MistralForCausalLM", _GROUPED | {"sliding_window": 4}),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {k: v for k, v in _GROUPED.items() if k != "head_dim"}),
    "bert": ("BertConfig", "BertForMaskedLM", _BERT),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", _BERT | {"max_position_embeddings": 130}),
    "bloom": ("BloomConfig", "BloomForCausalLM", _OLD | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        _COMMON | {"num_kv_heads": 2, "new_decoder_architecture": True, "bias": True},
    ),
    "gptj": (
        "GPTJConfig",
        "GPTJForCausalLM",
        _OLD | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": 128, "rotary_dim": 4},
    ),
    "mpt": ("MptConfig", "MptForCausalLM", _OLD | {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        | {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "initializer_factor": 1.0}
        | {"num_decoder_layers": 3, "dropout_rate": 0.0},
    ),
    "bart": (
        "BartConfig",
        "BartForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "init_std": 0.2}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "dropout": 0.0}
        | {"max_position_embeddings": 128, "forced_eos_token_id": None},
    ),
}

NAMES = tuple(_MODELS)
ENCODERS = frozenset({"bert", "roberta"})
SEQ2SEQ = frozenset({"t5", "bart"})


def tiny(name: str) -> PreTrainedModel:
    """A fresh tiny model, the same weights each time: fp32, eval mode. Norms and biases are moved off 1 and 0."""
    return copy.deepcopy(_built(name))


@cache
def _built(name: str) -> PreTrainedModel:
    config_class, model_class, values = _MODELS[name]
    config = getattr(transformers, config_class)(**values)
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # a bias at 0 or a norm at 1 would hide that it was dropped
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    torch.random.set_rng_state(state)
    return model.eval()


def inputs(model: PreTrainedModel, rows: int = 2, length: int = 9, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random ids that the model can be called with; a sequence-to-sequence model gets decoder ids too."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {})


@torch.no_grad()
def logits(model: PreTrainedModel, **more: Any) -> torch.Tensor:
    """The logits of the model for `inputs`."""
    return model(**(inputs(model) | more)).logits
