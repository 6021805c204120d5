"""A task's head as a function of hidden states: the model's own forward, with hidden states in its trunk's place.

So every family's head is served, dropout and pooler included, and none is written down here. Whether it reads a row's
first token or its last is found by comparing with the model's own answer, not by a list of names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from peftctl.errors import ModelError
from peftctl.surgery import device_of, head_of_task

Reads = Literal["first", "last", "each"]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
LOOSE = 3e-2
NO_PADDING = -1  # an id that no token has


class Answer(NamedTuple):
    """What the trunk would answer. The names are those that models of transformers ask for, in their order."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    past_key_values: None = None
    cache: None = None
    hidden_states: None = None
    attentions: None = None


class TaskHead:
    """Hidden states to scores. `reads`: of a row its first token, its last, or each token for itself."""

    def __init__(self, model: Any, reads: Reads) -> None:
        self.model = model
        self.reads = reads

    def __call__(self, hidden: Tensor) -> Tensor:
        """Scores (n, outputs) in fp32 from hidden states (n, d)."""
        # rows of one token each, or one row of them all
        shaped = hidden[None] if self.reads == "each" else hidden[:, None]
        ids = torch.zeros(shaped.shape[:2], dtype=torch.long, device=hidden.device)
        with _given(self.model, shaped):
            scores: Tensor = self.model(input_ids=ids).logits
        return scores.reshape(len(hidden), -1).float()


@contextmanager
def _given(model: Any, hidden: Tensor) -> Iterator[None]:
    """Within it, the trunk answers with these hidden states, and none of their tokens is padding."""
    trunk, config = model.base_model, model.config.get_text_config()
    pooler, before, padding = getattr(trunk, "pooler", None), vars(trunk).get("forward"), config.pad_token_id
    pooled = pooler(hidden) if isinstance(pooler, nn.Module) else None
    config.pad_token_id = NO_PADDING
    vars(trunk)["forward"] = lambda *args, **kwargs: Answer(hidden, pooled)
    try:
        yield
    finally:
        config.pad_token_id = padding
        del vars(trunk)["forward"]
        if before is not None:
            vars(trunk)["forward"] = before


@torch.no_grad()
def task_head_of(model: Any) -> TaskHead | None:
    """The head of a model that is asked for a task, None for another. Raises ModelError for one that reads otherwise.

    The model must be in eval mode.
    """
    parts = head_of_task(model)
    if not parts:
        return None
    padding = model.config.get_text_config().pad_token_id
    ids = torch.tensor([[i for i in range(2, 8) if i != padding]], device=device_of(model))
    with _drawn(model, parts):
        expected = model(input_ids=ids).logits.float()
        hidden = model.base_model(input_ids=ids)[0][0]
        if expected.ndim == 3:
            found: dict[Reads, Tensor] = {"each": TaskHead(model, "each")(hidden) - expected[0]}
        else:
            found = {"first": TaskHead(model, "first")(hidden[:1]), "last": TaskHead(model, "last")(hidden[-1:])}
            found = {reads: scores - expected for reads, scores in found.items()}
    errors = {reads: float(error.abs().max() / expected.abs().max()) for reads, error in found.items()}
    reads = min(errors, key=errors.__getitem__)
    if errors[reads] <= TOLERANCE.get(hidden.dtype, LOOSE):
        return TaskHead(model, reads)
    raise ModelError(
        f"{type(model).__name__} scores neither a row's first token nor its last alone: its head is not supported"
    )


@contextmanager
def _drawn(model: nn.Module, parts: list[str]) -> Iterator[None]:
    """Random numbers in the head for a while: one of zeros would answer the same whatever it reads."""
    tensors = [parameter for part in parts for parameter in model.get_submodule(part).parameters()]
    own, generator = [tensor.data for tensor in tensors], torch.Generator().manual_seed(0)
    try:
        for tensor in tensors:
            tensor.data = (torch.randn(tensor.shape, generator=generator) * 0.1).to(tensor)
        yield
    finally:
        for tensor, data in zip(tensors, own, strict=True):
            tensor.data = data
