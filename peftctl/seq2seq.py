"""Encoder-decoders: which models are, what any model answers by itself, and the pass over both sides in rectangles.

The encoder reads each different prompt once, whatever rows ask about it; the decoder reads the rows' own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from peftctl.batch import Batch
from peftctl.kernels.prefixed import running
from peftctl.methods.attachment import Virtual


def two_sided(model: Any) -> bool:
    """Whether a model is an encoder-decoder."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def start_of(model: Any) -> int:
    """The token that an encoder-decoder's decoder begins with."""
    start: int = model.config.decoder_start_token_id
    return start


def call(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What a model can be called with, from ids (rows, tokens): of an encoder-decoder, for both sides."""
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if two_sided(model) else {})


def answered(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (rows, tokens, vocabulary) and last hidden states (rows, tokens, d), as the model itself gives them."""
    if not two_sided(model):
        return model(**inputs).logits, model.base_model(**inputs)[0]
    output = model(**inputs, output_hidden_states=True)
    return output.logits, output.decoder_hidden_states[-1]


def prefixed(model: Any, virtual: Virtual | None) -> AbstractContextManager[None]:
    """What an encoder-decoder runs in, so that its attentions see the virtual tokens."""
    if virtual is None:
        return nullcontext()
    held = zip(virtual.paths, virtual.keys, virtual.values, strict=True)
    return running(model, {model.get_submodule(path): (keys, values) for path, keys, values in held})


def hidden(model: Any, batch: Batch, virtual: Virtual | None = None) -> Tensor:
    """The decoder's last hidden states, (rows, tokens of the longest row's decoder side, d)."""
    with prefixed(model, virtual):
        return _hidden(model, batch)


def _hidden(model: Any, batch: Batch) -> Tensor:
    prompts = list(dict.fromkeys(row.ids[: row.source] for row in batch.rows))
    which = torch.tensor([prompts.index(row.ids[: row.source]) for row in batch.rows], device=batch.ids.device)
    ids, real = rectangle(prompts, batch.ids.device)
    states = model.get_encoder()(input_ids=ids, attention_mask=real.long()).last_hidden_state
    ids, own = rectangle([row.ids[row.source :] for row in batch.rows], batch.ids.device)
    output: Tensor = model.get_decoder()(
        input_ids=ids,
        attention_mask=own.long(),
        encoder_hidden_states=states[which],
        encoder_attention_mask=real[which].long(),
        use_cache=False,
    ).last_hidden_state
    return output


def rectangle(values: Sequence[Sequence[int]], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The values of each row in a rectangle, 0 beside them, and where they are; (rows, longest) each."""
    lengths = torch.tensor([len(row) for row in values], device=device)
    real = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
    found = torch.zeros(real.shape, dtype=torch.long, device=device)
    found[real] = torch.tensor([value for row in values for value in row], device=device)
    return found, real
