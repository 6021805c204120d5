"""What an adapter's folder says of the base that it was trained on, and of the method block; its files' names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peftctl.base import Base
from peftctl.errors import FormatError
from peftctl.formats import added, heads
from peftctl.formats.shards import fingerprint
from peftctl.skeleton import Skeleton

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
OURS = "peftctl.json"
FORMAT = 1


def facts(base: Base, skeleton: Skeleton) -> dict[str, Any]:
    """What finds the base again, and tells whether it is the same one."""
    return {
        "name": lasting_name(base),
        "revision": base.revision,
        "rows": None if base.rows is None else base.rows._asdict(),
        "architecture": skeleton.architecture,
        "weights": fingerprint(base.weights) if base.weights is not None else None,
    }


def other_base(folder: Path, trained_on: str | None, weights: str | None, base: Base) -> str | None:
    """What is said of an adapter that was trained on other weights than this base's; None where it was not.

    Of an adapter that does not say what it was trained on nothing is known.
    """
    if weights is None or base.weights is None or weights == fingerprint(base.weights):
        return None
    name = lasting_name(base)
    told = f"and {name} holds other weights" if name != trained_on else "whose weights have changed since"
    return f"{folder} was trained on {trained_on}, {told}"


def lasting_name(base: Base) -> str:
    """The name by which a base is found from anywhere."""
    return base.name if base.revision is not None else str(Path(base.name).resolve())


def asked(base: Base, folder: Path) -> Base:
    """The base of an adapter, asked for what the adapter was trained for. Raises FormatError."""
    weights = folder / WEIGHTS
    own = ours(folder)["base"] if (folder / OURS).is_file() else None
    rows = added.guessed(base, weights) if own is None else added.recorded(own, folder)
    return base._replace(task=heads.read(folder, document(folder / CONFIG), weights, base), rows=rows)


def base_of(folder: Path) -> tuple[str | None, str | None]:
    """Name and revision of the base that an adapter was made for, as far as it says. Raises FormatError."""
    keys = document(folder / CONFIG)
    name, revision = keys.get("base_model_name_or_path"), keys.get("revision")
    if "peft_type" not in keys:
        name = keys.get("model_name") or None  # adapter-hub's word for it
    return (name if isinstance(name, str) else None), (revision if isinstance(revision, str) else None)


def ours(folder: Path) -> dict[str, Any]:
    own = document(folder / OURS)
    parts = [own.get("method"), own.get("base")]
    if own.get("format") != FORMAT or not all(isinstance(part, dict) for part in parts):
        found = own.get("format")
        raise FormatError(f"{folder / OURS}: format {found!r} was written by another version; this one reads {FORMAT}")
    return own | {"method": {k: v for k, v in own["method"].items() if k != "init_from"}}


def document(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{path} is not an adapter's config: it holds no keys")
    return found
