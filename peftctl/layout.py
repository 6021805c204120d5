"""How batches are laid out for a base: shared, joined or padded, found by trying and comparing, never by name."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from peftctl.batch import build
from peftctl.errors import ModelError
from peftctl.kernels import attention
from peftctl.methods.attachment import Attachment
from peftctl.policy import Layout, Policy, last_hidden
from peftctl.row import Row
from peftctl.seq2seq import answered, two_sided
from peftctl.surgery import device_of

NAMES = ("shared", "joined", "padded")
# relative to the largest hidden value; batch shape alone moves a real fp32 model by 3e-5
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-9}
LOOSE = 5e-2


@torch.no_grad()
def choose(model: nn.Module, layers: int, requested: str = "auto") -> Layout:
    """The first layout whose rows come out as each row alone does. Raises ModelError when none does."""
    training = model.training
    model.eval()
    try:
        return _choose(model, layers, requested)
    finally:
        model.train(training)


def _choose(model: nn.Module, layers: int, requested: str) -> Layout:
    names = NAMES if requested == "auto" else (requested,)
    rows, others = _rows(model)
    alone = _alone(model, rows)
    reasons: list[str] = []
    for name in names:
        for first in _first_positions(model):
            layout = Layout(name, first, "; ".join(reasons))
            fault = _fault(model, layout, layers, rows, others, alone)
            if fault is None:
                return layout
        reasons.append(f"{name}: {fault}")
    raise ModelError(f"{type(model).__name__} cannot be served batched: {'; '.join(reasons)}")


def _rows(model: Any) -> tuple[list[Row], list[Row]]:
    """A few rows, two of which share a start; and the same with another last row, which must change nothing else."""
    generator = torch.Generator().manual_seed(0)
    high = min(model.config.get_text_config().vocab_size, 1000)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, high, (length,), generator=generator).tolist())

    start, one, two, three, other = ids(6), ids(7), ids(7), ids(9), ids(9)

    def row(tokens: tuple[int, ...]) -> Row:
        return Row(tokens, (1.0,) * len(tokens), source=len(tokens) // 2 if two_sided(model) else 0)

    shared = [row(start + one), row(start + two)]
    return [*shared, row(three)], [*shared, row(other)]


def _alone(model: Any, rows: list[Row]) -> list[Tensor]:
    """The hidden states of each row as the model itself gives them; rows of one length stand in one plain rectangle."""
    if two_sided(model):
        return [_answer(model, row) for row in rows]
    found: list[Tensor] = []
    for _, alike in groupby(rows, key=lambda row: len(row.ids)):
        ids = torch.tensor([row.ids for row in alike], device=device_of(model))
        found += last_hidden(model.base_model(input_ids=ids))
    return found


def _answer(model: Any, row: Row) -> Tensor:
    """What an encoder-decoder's decoder answers about one row."""
    ids = torch.tensor([row.ids], device=device_of(model))
    inputs = {"input_ids": ids[:, : row.source], "decoder_input_ids": ids[:, row.source :]}
    return answered(model, inputs)[1][0]


def _first_positions(model: Any) -> list[int]:
    """0, and where positions start for families that count them from the padding index on."""
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    return [0, padding + 1] if isinstance(padding, int) and padding >= 0 else [0]


def _fault(
    model: nn.Module, layout: Layout, layers: int, rows: list[Row], others: list[Row], alone: list[Tensor]
) -> str | None:
    """Why a layout does not serve, None if it does."""
    policy = Policy(model, Attachment(), layout, None)
    device = device_of(model)
    try:
        together = policy.row_hidden(build(rows).to(device))
        if layout.name != "padded" and policy.attention_calls != layers:
            return f"attention was dispatched {policy.attention_calls} times in {layers} layers"
        after = policy.row_hidden(build(others).to(device))
    except (attention.Unsupported, RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else 'no message'}"
    if layout.name != "padded" and any(distance(a, b) > 1e-6 for a, b in zip(together[:2], after[:2], strict=True)):
        return "rows see each other"
    worst = max(distance(a, b) for a, b in zip(together, alone, strict=True))
    limit = TOLERANCE.get(alone[0].dtype, LOOSE)
    return None if worst <= limit else f"rows differ from each row alone by {worst:.1e} (at most {limit:.0e})"


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-12))
