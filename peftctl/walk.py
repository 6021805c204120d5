"""A model that answers out of its files: its forward, as it is, over parameters that are read when they are used.

Nothing of the model is loaded but its small buffers, so that an answer takes the memory of one matrix's block, in fp32
whatever the files hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from re import search
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftctl import model as models
from peftctl.base import Base
from peftctl.errors import ModelError, several
from peftctl.file_weights import Table, table
from peftctl.formats.peft import Adapter
from peftctl.lazy import Reading, Unreadable
from peftctl.methods.attachment import Attachment, Delta
from peftctl.seq2seq import call
from peftctl.skeleton import block_of
from peftctl.surgery import find, head_of_task

# what code raises that finds another parameter than it expects
LOST = (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, KeyError, AttributeError)


def _measured(delta: Delta, module: nn.Module, args: Any) -> None:
    delta.measure()


def _noted(states: dict[str, Tensor], path: str, module: nn.Module, args: Any, output: Any) -> None:
    states[path] = output[0] if isinstance(output, tuple) else output


class Answers(NamedTuple):
    """`logits`: as the model gives them, all rows; `states`: what each of its blocks gave, by its path."""

    logits: Tensor
    states: dict[str, Tensor]


class Walk(NamedTuple):
    """A model without weights, and how to read them. `attachments`: deltas, which are hung on it to answer."""

    model: Any
    reading: Reading
    attachments: list[Attachment]


def walk(base: Base, adapters: Sequence[Adapter], *, trust_remote_code: bool = False) -> Walk:
    """Over the files of a base, with adapters on it. Raises ModelError where the files are not those of its config."""
    from peftctl.adapter import filled

    assert base.weights is not None
    model = models.empty(base, trust_remote_code=trust_remote_code).float().eval()
    model.config.use_cache = False
    text = model.config.get_text_config()
    if base.task is not None and getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = -1  # no token: each row is read to its end
    own = table(model, base.weights, base.rows)
    _complete(model, own, base)
    # after the buffers: an embedding's scale is one
    return Walk(model, Reading(own.parameters), [filled(model, adapter) for adapter in adapters])


@torch.no_grad()
def answers(walked: Walk, ids: Tensor) -> Answers:
    """Of rows of ids, (rows, tokens). Raises Unreadable where the model's code wants its parameters in another way."""
    states: dict[str, Tensor] = {}
    model, handles = walked.model, []
    for attachment in walked.attachments:
        attachment.eval().install(model)
        for path, delta, _ in attachment.places:
            handles.append(find(model, path).register_forward_pre_hook(partial(_measured, delta), prepend=True))
    for path, module in model.named_modules():
        if path and block_of(path) == path:
            handles.append(module.register_forward_hook(partial(_noted, states, path)))
    try:
        with walked.reading:
            logits = model(**call(model, ids)).logits
    except LOST as error:
        raise Unreadable(f"{type(model).__name__} reads its weights in a way of its own: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
        for attachment in walked.attachments:
            attachment.remove()
    if logits.is_meta:
        raise Unreadable(f"{type(model).__name__} gives logits without values")
    return Answers(logits.float(), states)


def first_apart(expected: Answers, actual: Answers, share: float) -> str | None:
    """The first block whose answers differ by more than a share of their norm, or by what is no number."""
    for path, states in expected.states.items():
        if path not in actual.states or states.shape != actual.states[path].shape:
            return path
        if not float((actual.states[path] - states).norm()) <= share * float(states.norm()):
            return path
    return None


def _complete(model: Any, own: Table, base: Base) -> None:
    """Give the model its buffers, and what its files need not hold, as transformers makes them on loading.

    Raises ModelError for what the files should hold.
    """
    head = tuple(f"{path}." for path in head_of_task(model))  # the adapter has it
    lacking, misshapen = ([n for n in names if not n.startswith(head)] for names in (own.missing, own.misshapen))
    if misshapen:
        raise ModelError(f"{base.name} cannot be loaded: {misshapen[0]} has another shape than its config says")
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    if lost := sorted(name for name in lacking if not any(search(pattern, name) for pattern in ignored)):
        raise ModelError(f"{base.name} lacks {len(lost)} tensors of its architecture: {several(lost)}")
    for name in lacking:
        path, _, last = name.rpartition(".")
        parameter = model.get_parameter(name)
        setattr(find(model, path), last, nn.Parameter(torch.zeros_like(parameter, device="cpu"), requires_grad=False))
    for module in model.modules():
        module._is_hf_initialized = False
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    for parameter in model.parameters():
        parameter._is_hf_initialized = parameter.is_meta
    model.initialize_weights()
    for name, value in own.buffers.items():
        model.get_buffer(name).copy_(value)
