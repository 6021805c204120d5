"""Reading and reaching into a base model: modules by dotted path, weights as (out, in), the skeleton table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftctl.errors import ModelError
from peftctl.skeleton import Dimensions, Module, NewRows, Skeleton, dotted
from peftctl.task import HEADED

ROWS = "_peftctl_rows"  # attribute of a model that was grown for new tokens
NEW = "_peftctl_new"  # attribute of a model: paths of modules of its trunk that its files do not hold


def find(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path. Raises AttributeError when there is none."""
    return model.get_submodule(path)


def kind_of(module: nn.Module) -> str:
    """Linear, Conv1D, Embedding, Norm, Experts or ExpertsTransposed for what behaves as one; else the class name."""
    if isinstance(module, nn.Linear):
        return "Linear"
    if isinstance(module, Conv1D):
        return "Conv1D"
    if isinstance(module, nn.Embedding):
        return "Embedding"
    count = getattr(module, "num_experts", None)
    if any(p.ndim == 3 and len(p) == count for p in module.parameters(recurse=False)):
        return "ExpertsTransposed" if getattr(module, "is_transposed", False) else "Experts"
    return "Norm" if type(module).__name__.endswith("Norm") else type(module).__name__


def out_in(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight seen as (out, in): Conv1D stores (in, out), an embedding (rows, width)."""
    return weight.T if kind_of(module) in ("Conv1D", "Embedding") else weight


def skeleton(model: nn.Module) -> Skeleton:
    """The skeleton table of a Hugging Face model, real or on the meta device."""
    config: Any = model.config
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    head = head_of_task(model)
    modules: list[Module] = []
    added: list[Module] = []
    for path, module in model.named_modules():
        shapes = {}
        for name, parameter in module.named_parameters(recurse=False):
            full = dotted(path, name)
            shapes[name] = tuple(parameter.shape)
            if first.setdefault(id(parameter), full) != full:
                tied[full] = first[id(parameter)]
        inside = any(f"{path}.".startswith(f"{part}.") for part in head)
        (added if inside else modules).append(Module(path, kind_of(module), type(module).__name__, shapes))
    return Skeleton(
        architecture=type(model).__name__,
        model_type=config.model_type,
        modules=tuple(modules),
        tied=tied,
        head=head_path(model),
        dimensions=dimensions(config),
        added=tuple(added),
        rows=new_rows(model),
        vocabulary=tuple(vocabulary_paths(model)),
    )


def embed_scale(module: nn.Module) -> float:
    """What an embedding multiplies its rows by after the lookup (Gemma does); 1 on the meta device, where none is."""
    scale = getattr(module, "embed_scale", 1.0)
    return 1.0 if isinstance(scale, Tensor) and scale.is_meta else float(scale)


def new_rows(model: nn.Module) -> NewRows | None:
    """The rows that a model was grown by."""
    found: NewRows | None = getattr(model, ROWS, None)
    return found


def vocabulary_paths(model: Any) -> list[str]:
    """The modules with a row for each token: the embeddings, and the output head where there is one."""
    paths = {id(module): path for path, module in model.named_modules()}
    both = [getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    return list(dict.fromkeys(paths[id(module)] for module in both if id(module) in paths))


@torch.no_grad()
def grown(model: Any, rows: NewRows | None) -> Any:
    """The model with rows for new tokens, each the mean of its own. Raises ModelError where it has other rows."""
    if rows is None:
        return model
    setattr(model, ROWS, rows)
    held = model.get_input_embeddings().weight.shape[0]
    if held != rows.before:
        raise ModelError(f"model.add_tokens: the embeddings have {held} rows, but the config says {rows.before}")
    if rows.total > held:
        model.resize_token_embeddings(rows.total, mean_resizing=False)
        for path in vocabulary_paths(model):
            for parameter in find(model, path).parameters(recurse=False):
                parameter[held:] = parameter[:held].float().mean(0)
    return model


def head_of_task(model: Any) -> list[str]:
    """Paths of the modules that make up a task's head: what lies outside the trunk, and what `NEW` names inside it."""
    if not type(model).__name__.endswith(tuple(HEADED.values())):
        return []
    outside = [path for path, module in model.named_children() if module is not model.base_model]
    return [path for path in outside if list(model.get_submodule(path).parameters())] + list(getattr(model, NEW, ()))


def head_path(model: nn.Module) -> str | None:
    """Path of the output head, None for a model without one."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return next((path for path, module in model.named_modules() if module is head), None) if head is not None else None


def dimensions(config: Any) -> Dimensions:
    """Layers, widths and heads from a Hugging Face config, whatever the family calls them."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    heads = _first(text, "num_attention_heads", "n_head", "n_heads", "num_heads") or 0
    hidden = _first(text, "hidden_size", "n_embd", "d_model", "dim") or 0
    head_dim = _first(text, "head_dim", "d_kv") or (hidden // heads if heads else 0)
    multi_query = bool(getattr(text, "multi_query", False)) and not getattr(text, "new_decoder_architecture", False)
    kv_heads = 1 if multi_query else _first(text, "num_key_value_heads", "num_kv_heads") or heads
    layers = _first(text, "num_hidden_layers", "n_layer", "n_layers", "num_layers") or 0
    vocabulary = _first(text, "vocab_size") or 0
    if not getattr(config, "is_encoder_decoder", False):
        return Dimensions(layers, hidden, heads, kv_heads, head_dim, vocabulary)
    # some call the encoder's layers by the plain name
    encoder = _first(config, "encoder_layers", "num_layers", "num_hidden_layers") or 0
    decoder = _first(config, "decoder_layers", "num_decoder_layers") or layers
    return Dimensions(decoder, hidden, heads, kv_heads, head_dim, vocabulary, encoder)


def _first(config: Any, *names: str) -> int | None:
    values: Iterator[Any] = (getattr(config, name, None) for name in names)
    return next((int(value) for value in values if isinstance(value, int) and value), None)


def frozen(model: nn.Module) -> nn.Module:
    """The model with no parameter asking for a gradient: invariant 1, the base is never changed."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def without_dropout(model: nn.Module) -> nn.Module:
    """The model with every dropout probability at 0, whether a module's own or handed to a function."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or name == "p" or name.endswith("_pdrop")):
                setattr(module, name, 0.0)
    return model


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def swapped(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values in the tensors' place for a while; the tensors' own storage is not written to."""
    own = {name: tensor.data for name, tensor in tensors.items()}
    try:
        for name, tensor in tensors.items():
            tensor.data = values[name]
        yield
    finally:
        for name, tensor in tensors.items():
            tensor.data = own[name]
