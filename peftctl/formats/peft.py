"""Adapter folders: adapter_config.json and adapter_model.safetensors as the `peft` package has them, and ours beside.

Where a method exists in peft the two files are peft's, with its long-standing keys alone; elsewhere the tensors keep
our names and `peft_type` says so. peftctl.json adds what peft has no place for: the whole method block and the base.
manifest.json has the checksums of all; folders of other programs lack both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from peftctl import methods
from peftctl.base import Base
from peftctl.errors import FormatError, TargetError
from peftctl.formats import adapterhub, added, heads, origin
from peftctl.formats.origin import CONFIG, FORMAT, OURS, WEIGHTS
from peftctl.formats.shards import read as read_header
from peftctl.methods.base import Exchange, Method, MethodConfig
from peftctl.methods.whole import named
from peftctl.skeleton import Skeleton, dotted
from peftctl.storage import MANIFEST, seal, verify

if TYPE_CHECKING:
    from torch import Tensor

PROMPTS = frozenset({"PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"})  # nothing of the model is changed
OWN_TYPE = "PEFTCTL"  # peft refuses it by name, as it should


class Adapter(NamedTuple):
    """An adapter read from a folder; `tensors` under our names.

    `trained_on` and `fingerprint`: the base it was trained on and that base's weights, where the folder says it.
    """

    folder: Path
    method: Method[Any]
    config: MethodConfig
    tensors: dict[str, Tensor]
    trained_on: str | None
    fingerprint: str | None


def write(
    folder: Path,
    method: Method[Any],
    config: MethodConfig,
    skeleton: Skeleton,
    tensors: Mapping[str, Tensor],
    base: Base,
) -> None:
    """Write them into an existing folder, and a task's config beside them. Raises FormatError, OSError."""
    keys, stored = as_peft(method, config, skeleton, tensors)
    facts = origin.facts(base, skeleton)
    if exchanged(method, skeleton) is not None:
        stored |= _grown(keys, stored, skeleton, tensors, base)
    document = {"format": FORMAT, "method": json.loads(config.model_dump_json()), "base": facts}
    (folder / OURS).write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    _files(folder, keys, stored, base, skeleton)


def write_likeness(
    folder: Path,
    method: Method[Any],
    config: MethodConfig,
    skeleton: Skeleton,
    tensors: Mapping[str, Tensor],
    base: Base,
) -> str:
    """Write peft's files alone, of a method that peft lacks, as another of peft's that computes the same.

    Answers peft's name of that one. Raises FormatError where none does, OSError.
    """
    assert method.likeness is not None
    keys, stored = _beside(
        method.likeness()(lambda full: added.stored(base, skeleton, full)), config, skeleton, tensors
    )
    _files(folder, keys, stored | _grown(keys, stored, skeleton, tensors, base), base, skeleton)
    return str(keys["peft_type"])


def _grown(
    keys: Mapping[str, Any], stored: Iterable[str], skeleton: Skeleton, tensors: Mapping[str, Tensor], base: Base
) -> dict[str, Tensor]:
    """The grown matrices of new tokens; `stored`: the names of all else in the file."""
    rows = added.apart(skeleton, tensors)[0]
    whole = added.whole(base, skeleton, rows) if rows else {}
    return {added.name(_saved_prefix(keys), full, stored): tensor for full, tensor in whole.items()}


def _files(folder: Path, keys: Mapping[str, Any], stored: Mapping[str, Tensor], base: Base, skeleton: Skeleton) -> None:
    """Write peft's two files, a task's config where there is a head, and the manifest of all there are."""
    from safetensors.torch import save_file

    own = {"base_model_name_or_path": origin.lasting_name(base), "revision": base.revision}
    (folder / CONFIG).write_text(json.dumps({**keys, **own}, indent=2, sort_keys=True) + "\n", "utf-8")
    # contiguous and apart: the format stores neither strides nor shared memory
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in stored.items()}
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})
    heads.write(folder, base, skeleton)
    seal(folder, [name for name in (CONFIG, WEIGHTS, OURS, heads.CONFIG) if (folder / name).is_file()])


def as_peft(
    method: Method[Any], config: MethodConfig, skeleton: Skeleton, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Keys of the config and tensors in peft's form, or under our names where peft lacks the method.

    Rows of new tokens are left out of peft's, which has their whole matrices instead.
    """
    exchange = exchanged(method, skeleton)
    if exchange is None:
        return {"peft_type": OWN_TYPE, "inference_mode": True}, dict(tensors)
    return _beside(exchange.write, config, skeleton, tensors)


def _beside(
    write: Callable[[Any, Skeleton, Mapping[str, Any]], tuple[dict[str, Any], dict[str, Any]]],
    config: MethodConfig,
    skeleton: Skeleton,
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write` makes of a method's own tensors, with the saved modules and a task's head beside it."""
    tensors = added.apart(skeleton, tensors)[1]
    paths = [path for name in config.save_modules or () for path in named(skeleton, name)] + heads.tops(skeleton)
    full = {
        dotted(m.path, name): skeleton.tied.get(dotted(m.path, name), dotted(m.path, name))
        for m in (*skeleton.modules, *skeleton.added)
        for name in m.shapes
        if any(f"{m.path}.".startswith(f"{path}.") for path in paths)
    }
    own = {name: tensor for name, tensor in tensors.items() if name not in full.values()}
    keys, stored = write(config, skeleton, own)
    if not paths:
        return keys, stored
    prefix = _saved_prefix(keys)
    return keys | {"modules_to_save": paths}, stored | {prefix + there: tensors[ours] for there, ours in full.items()}


def exchanged(method: Method[Any], skeleton: Skeleton) -> Exchange | None:
    """How a method's adapters of such a base are written for peft; None where it lacks them."""
    exchange = method.exchange() if method.exchange is not None else None
    return exchange if exchange is not None and exchange.holds(skeleton) else None


def _saved_prefix(keys: Mapping[str, Any]) -> str:
    """What stands before a saved module's path: peft wraps the model once more where modules are changed."""
    return "base_model." if keys["peft_type"] in PROMPTS else "base_model.model."


def read(folder: Path, skeleton: Skeleton) -> Adapter:
    """An adapter of ours, of peft's or of adapter-hub's, for a base of this skeleton.

    Raises FormatError with what is wrong.
    """
    _intact(folder)
    keys = origin.document(folder / CONFIG)
    kind = keys.get("peft_type")
    if kind is None and "config" in keys:
        return _adapterhub(folder, keys, skeleton)
    if kind is None:
        raise FormatError(f"{folder / CONFIG} is not an adapter's: it has no peft_type")
    stored = _tensors(folder)
    ours = origin.ours(folder) if (folder / OURS).is_file() or kind == OWN_TYPE else None
    trained = ours["base"] if ours is not None else {}
    added.same(trained, skeleton, folder)
    if kind == OWN_TYPE and ours is not None:
        block, tensors = ours["method"], dict(stored)
    else:
        preferred = str(ours["method"].get("name")) if ours is not None else None
        block, tensors = _exchanged(folder, keys, skeleton, stored, preferred)
    method = methods.get(str(block.get("name")))
    config = _config(method, block, folder)
    return Adapter(folder, method, config, tensors, trained.get("name"), trained.get("weights"))


def _intact(folder: Path) -> None:
    """Refuse files that are not as they were written. Other programs' folders say nothing of that."""
    if not (folder / MANIFEST).exists():
        return
    try:
        verify(folder)
    except FormatError as error:
        raise FormatError(f"{error}; if it was changed on purpose, remove {MANIFEST}") from None


def _adapterhub(folder: Path, document: Mapping[str, Any], skeleton: Skeleton) -> Adapter:
    block, tensors = adapterhub.read(folder, document, skeleton)
    method = methods.get(str(block["name"]))
    return Adapter(folder, method, _config(method, block, folder), tensors, None, None)


def _config(method: Method[Any], block: Mapping[str, Any], folder: Path) -> MethodConfig:
    try:
        config: MethodConfig = method.config.model_validate(block)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        raise FormatError(f"{folder / CONFIG}: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from None
    return config


def _exchanged(
    folder: Path,
    keys: Mapping[str, Any],
    skeleton: Skeleton,
    stored: Mapping[str, Tensor],
    preferred: str | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The method block and tensors of a file in peft's form."""
    exchange = _exchange(folder, keys, preferred)
    try:
        whole, rows = _saved_in(keys, skeleton, stored), dict[str, Any]()
        grown = added.held(skeleton, _saved_prefix(keys), set(stored) - set(whole))
        if preferred is None:  # another program's: nobody says that the other rows are the base's
            grown = {name: full for name, full in grown.items() if ".base_layer." not in name}
            whole |= {name: skeleton.tied.get(full, full) for name, full in grown.items()}
        else:
            rows = added.cut(skeleton, {full: stored[name] for name, full in grown.items()})
        rest = {name: tensor for name, tensor in stored.items() if name not in whole and name not in grown}
        block, tensors = exchange.read(dict(keys) | {"modules_to_save": None}, skeleton, rest)
    except (FormatError, TargetError) as error:
        raise FormatError(f"{folder}: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FormatError(f"{folder / CONFIG} has a value that peft would not write: {error}") from None
    head = {module.path for module in skeleton.added}
    modules = [path for path in dict.fromkeys(full.rpartition(".")[0] for full in whole.values()) if path not in head]
    saved = {ours: stored[name] for name, ours in whole.items()}
    return block | {"save_modules": modules or None}, tensors | saved | rows


def _saved_in(keys: Mapping[str, Any], skeleton: Skeleton, stored: Mapping[str, Tensor]) -> dict[str, str]:
    """The stored tensors of saved modules, each with its name here; of tied ones any place will do."""
    names, prefix = keys.get("modules_to_save") or [], _saved_prefix(keys)

    def meant(path: str) -> bool:  # peft matches the end of a path, even within a word
        parts = path.split(".")
        return any(".".join(parts[: n + 1]).endswith(name) for n in range(len(parts)) for name in names)

    there = [
        (f"{prefix}{dotted(m.path, name)}", dotted(m.path, name))
        for m in (*skeleton.modules, *skeleton.added)
        for name in m.shapes
        if meant(m.path)
    ]
    return {name: skeleton.tied.get(full, full) for name, full in there if name in stored}


def _exchange(folder: Path, keys: Mapping[str, Any], preferred: str | None) -> Exchange:
    """The reader of a peft type: the method that wrote the folder where it claims it, else whichever does."""
    kind, known = str(keys["peft_type"]), []
    for name in sorted(methods.names(), key=lambda name: name != preferred):
        exchange = methods.get(name).exchange
        if exchange is not None:
            known.append(exchange())
    found = next((exchange for exchange in known if exchange.peft_type == kind and exchange.claims(keys)), None)
    if found is None:
        served = ", ".join(dict.fromkeys(exchange.peft_type for exchange in known))
        raise FormatError(f"{folder / CONFIG}: peft_type {kind} is not read; {served} are")
    return found


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        found = "only adapter_model.bin, a pickle, which is never read" if pickled else f"no {WEIGHTS}"
        raise FormatError(f"{folder} holds {found}: save it again as safetensors")
    read_header(path)  # refused here before anything of the size that it claims is made
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from None
