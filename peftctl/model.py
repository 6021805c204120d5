"""Loading a base: its weights, or only its skeleton. The only importer of transformers' Auto classes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftctl import compute
from peftctl.base import Base, cache_folder
from peftctl.compute import Precision
from peftctl.errors import ModelError
from peftctl.formats.shards import shards
from peftctl.skeleton import Dimensions, Module, NewRows, Skeleton
from peftctl.task import TASKS, labelled

if TYPE_CHECKING:
    import torch


def load(
    base: Base,
    precision: Precision,
    device: str,
    seed: int,
    *,
    trust_remote_code: bool = False,
    notice: Callable[[str], None] = lambda text: None,
) -> Any:
    """The frozen model in eval mode on a device. Raises ModelError when the weights do not fit the architecture.

    `notice` is called with a line where the model is computed in another type than it is stored in.
    """
    from peftctl.kernels.stored import multiply_in, stored_type
    from peftctl.surgery import frozen, grown, head_of_task

    _quiet()
    wanted = _dtype(precision.stored)
    model = _random(base, wanted, seed) if base.weights is None else _stored(base, wanted, trust_remote_code)
    model = frozen(_widened(grown(model, base.rows))).to(device).eval()
    stored = stored_type(model)
    choice = compute.choose(precision.compute, stored, device)
    if choice.dtype is stored:
        return model
    notice(compute.describe(choice, stored))
    return multiply_in(model, choice.dtype, keep=head_of_task(model))


def device(name: str) -> str:
    """The device that `auto` means: CUDA, then MPS, then CPU. Raises ModelError when a named one is not there."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(kind for kind, usable in there.items() if usable)
    if not there.get(name.split(":")[0], False):
        usable = ", ".join(kind for kind, yes in there.items() if yes)
        raise ModelError(f"train.device: {name!r} is not on this machine; there is: {usable}")
    return name


def skeleton(base: Base, *, trust_remote_code: bool = False) -> Skeleton:
    """The module table of a base, without its weights; kept under the config's hash, so asking again is instant."""
    path = cache_folder() / "skeletons" / f"{_key(base)}.json"
    kept = _kept(path)
    if kept is not None:
        return kept
    table = _meta(base, trust_remote_code)
    with suppress(OSError):  # a cache that cannot be written costs time, no more
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(_write(table)), "utf-8")
        temporary.replace(path)
    return table


def _kept(path: Path) -> Skeleton | None:
    """The table in a cache file; None where there is none, or a damaged one."""
    try:
        return _read(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _key(base: Base) -> str:
    asked = f"|3|{version('transformers')}"
    if base.task is not None:
        asked += f"|{base.task.name}|{len(base.task.labels)}|{_holds_pooler(base)}"
    if base.rows is not None:
        asked += f"|{json.dumps(base.rows)}"
    return hashlib.sha256(base.config.read_bytes() + asked.encode()).hexdigest()[:24]


def _write(table: Skeleton) -> dict[str, Any]:
    modules = {name: [list(m) for m in getattr(table, name)] for name in ("modules", "added")}
    rows = None if table.rows is None else table.rows._asdict()
    return table._asdict() | {"dimensions": table.dimensions._asdict(), "rows": rows, **modules}


def _read(stored: dict[str, Any]) -> Skeleton:
    modules = {
        name: tuple(Module(p, k, t, {n: tuple(s) for n, s in shapes.items()}) for p, k, t, shapes in stored[name])
        for name in ("modules", "added")
    }
    rows = stored["rows"] and NewRows(**(stored["rows"] | {"tokens": tuple(stored["rows"]["tokens"])}))
    facts = {"dimensions": Dimensions(**stored["dimensions"]), "rows": rows, "vocabulary": tuple(stored["vocabulary"])}
    return Skeleton(**(stored | modules | facts))


def _holds_pooler(base: Base) -> bool:
    """Whether a base's files hold what some families put between the trunk and a head; files without it are many."""
    if base.weights is None:
        return True
    return any(".pooler." in f".{entry.name}" for shard in shards(base.weights) for entry in shard.entries)


def _quiet() -> None:
    """Warnings about what is not a problem here, and bars beside ours, help nobody."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _dtype(name: str) -> torch.dtype | str:
    import torch

    if name == "auto":
        return "auto"
    wanted: torch.dtype = getattr(torch, name)
    return wanted


def _config(base: Base, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    # of the attention a name is left out: who attends is decided here, and transformers may fetch what has that name
    settings = {k: v for k, v in base.settings().items() if "attn_implementation" not in k}
    names = {} if base.task is None else labelled(base.task)
    if names:
        settings = {k: v for k, v in settings.items() if k not in ("num_labels", "problem_type")} | names
    try:
        if trust_remote_code and base.weights is not None:
            return AutoConfig.from_pretrained(base.weights, trust_remote_code=True, **names)
        return AutoConfig.for_model(**settings)
    except Exception as error:  # a stranger's config: transformers can fail on it in any way
        said = " ".join(str(error).split())
        raise ModelError(f"{base.name}: transformers {version('transformers')} cannot use its config: {said}") from None


def _auto(base: Base) -> Any:
    import transformers

    if base.task is not None and base.two_sided:
        raise ModelError(f"{base.name} is an encoder-decoder, which is served as seq2seq-lm, not as {base.task.name}")
    return getattr(transformers, f"AutoModel{TASKS[_task(base)]}")


def _task(base: Base) -> str:
    if base.task is not None:
        return base.task.name
    return "seq2seq-lm" if base.two_sided else "causal-lm"


def _from_config(base: Base, trust_remote_code: bool) -> Any:
    config = _config(base, trust_remote_code)
    try:
        return _marked(_auto(base).from_config(config, trust_remote_code=trust_remote_code), base)
    except Exception as error:  # as above
        raise ModelError(f"{base.name} ({config.model_type}) cannot be built: {_line(error, base)}") from None


def _marked(model: Any, base: Base) -> Any:
    """The model, told what of its trunk the base's files do not hold: it belongs to the head then."""
    from peftctl.surgery import NEW

    if base.task is not None and not _holds_pooler(base):
        prefix = model.base_model_prefix
        setattr(model, NEW, tuple(f"{prefix}.{n}" for n, _ in model.base_model.named_children() if n == "pooler"))
    return model


def _widened(model: Any) -> Any:
    """The model with a task's head in fp32, whatever the rest is: it is new, and small."""
    import torch

    from peftctl.surgery import head_of_task

    def cast(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(a.to(next(module.parameters()).dtype) if isinstance(a, torch.Tensor) else a for a in args)

    for path in head_of_task(model):
        module = model.get_submodule(path)
        module.to(torch.promote_types(next(module.parameters()).dtype, torch.float32))
        module.register_forward_pre_hook(cast)
    return model


def empty(base: Base, *, trust_remote_code: bool = False) -> Any:
    """The model on the meta device: its modules and shapes, no memory for weights."""
    import torch

    from peftctl.surgery import grown

    _quiet()
    with torch.device("meta"):
        return grown(_from_config(base, trust_remote_code), base.rows)


def _meta(base: Base, trust_remote_code: bool) -> Skeleton:
    from peftctl.surgery import skeleton as table_of

    model = empty(base, trust_remote_code=trust_remote_code)
    try:
        return table_of(model)
    except (TypeError, ValueError, AttributeError, KeyError, ZeroDivisionError) as error:
        raise ModelError(f"{base.name}: its config has a value that is none: {_line(error, base)}") from None


def _random(base: Base, dtype: torch.dtype | str, seed: int) -> Any:
    import torch

    torch.manual_seed(seed)
    model = _from_config(base, False)
    return model.to(torch.float32 if dtype == "auto" else dtype)


def _stored(base: Base, dtype: torch.dtype | str, trust_remote_code: bool) -> Any:
    from safetensors import SafetensorError

    from peftctl.surgery import head_of_task

    try:
        model, info = _auto(base).from_pretrained(
            base.weights,
            config=_config(base, trust_remote_code),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=base.task is not None,  # a head for other labels is a new one
        )
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{base.name} cannot be loaded: {_line(error, base)}") from None
    head = tuple(f"{path}." for path in head_of_task(_marked(model, base)))
    _require_same(base, [name for name, *_ in info["mismatched_keys"] if not name.startswith(head)])
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(head))
    if missing:
        raise ModelError(f"{base.name} lacks {len(missing)} tensors of its architecture: {', '.join(missing[:5])}")
    return model


def _require_same(base: Base, mismatched: list[str]) -> None:
    if mismatched:
        raise ModelError(f"{base.name} cannot be loaded: {mismatched[0]} has another shape than its config says")


def _line(error: Exception, base: Base) -> str:
    said = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    if not said.startswith("Unrecognized configuration class"):
        return said
    if _task(base) != "causal-lm":
        return f"transformers has no {_task(base)} of its kind"
    return "it is no causal language model; model.task may ask for another use"
