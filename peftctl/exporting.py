"""Exporting: an adapter in the form that another program loads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftctl.errors import InputError, SaveError, suggest
from peftctl.formats import adapterhub, gguf_adapter, origin, peft, vllm
from peftctl.opened import Found, find
from peftctl.run_folder import written_aside
from peftctl.storage import TEMPORARY


def export(
    adapter: str,
    output: Path,
    *,
    to: str,
    server: str | None = None,
    name: str = "peftctl",
    base: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write an adapter, or a run's, to `output` in the form `to`: peft, adapterhub or gguf.

    `server` names a program whose own rules are checked as well (vllm); `name` is the adapter's, where the form has
    one. Raises InputError, SaveError; there is no output then.
    """
    if to not in WRITERS:
        raise InputError(f"--to: {to!r} is none of {', '.join(WRITERS)}{suggest(to, WRITERS)}")
    if server is not None and (server != "vllm" or to != "peft"):
        raise InputError("--for: vllm is known, which reads what --to peft writes")
    if output.exists() and not (output.is_dir() and not any(output.iterdir()) and to != "gguf"):
        raise InputError(f"--output: {output} exists already; name another or remove it")
    found = find(adapter, base, trust_remote_code=trust_remote_code)
    if found.adapter is None:
        raise InputError(f"{adapter} is a model, not an adapter: there is nothing to export")
    if found.base.rows is not None and to != "peft":
        raise InputError(f"--to {to}: it has no place for the tokens that were added; {_instead(found)}")
    if found.skeleton.added and to != "peft":
        raise InputError(
            f"--to {to}: its form has no place for a head of {found.skeleton.architecture}; {_headed(found)}"
        )
    try:
        notes = WRITERS[to](found, output, server, name)
    except OSError as error:
        raise SaveError(f"{output} could not be written: {error.strerror or error}") from error
    method, tensors = found.adapter.method.name, found.adapter.tensors.values()
    numbers = sum(tensor.numel() for tensor in tensors)
    return {"output": str(output), "format": to, "method": method, "parameters": numbers, "notes": notes}


def _to_peft(found: Found, output: Path, server: str | None, name: str) -> list[str]:
    adapter = found.adapter
    assert adapter is not None
    if adapter.method.likeness is not None and server is None:
        with written_aside(output) as folder:
            form = (adapter.method, adapter.config, found.skeleton, adapter.tensors, found.base)
            kind = peft.write_likeness(folder, *form)
        return [f"peft loads it as {kind}"]
    if peft.exchanged(adapter.method, found.skeleton) is None:
        of = f" of {found.skeleton.architecture}" if adapter.method.exchange is not None else ""
        raise InputError(f"--to peft: the peft package has no {adapter.method.name} adapters{of}; {_instead(found)}")
    keys, stored = peft.as_peft(adapter.method, adapter.config, found.skeleton, adapter.tensors)
    problems = vllm.problems(keys, stored) if server else []
    problems += ["it takes no new tokens with an adapter"] if server and found.base.rows is not None else []
    if problems:
        raise InputError(f"--for vllm: {'; '.join(problems)}; {_instead(found)}")
    with written_aside(output) as folder:
        peft.write(folder, adapter.method, adapter.config, found.skeleton, adapter.tensors, found.base)
    return vllm.notes(keys) if server else []


def _headed(found: Found) -> str:
    assert found.adapter is not None
    return "use --to peft" if found.adapter.method.exchange is not None else "measure it with peftctl eval"


def _instead(found: Found) -> str:
    """What may be done with an adapter that another program does not take."""
    assert found.adapter is not None
    method = found.adapter.method
    if method.traits(found.adapter.config).foldable:
        return "fold it into its base with peftctl merge"
    return "export it --to adapterhub" if method.name in adapterhub.METHODS else "serve it with peftctl generate"


def _to_adapterhub(found: Found, output: Path, server: str | None, name: str) -> list[str]:
    adapter = found.adapter
    assert adapter is not None
    if not name.isidentifier():
        raise InputError(f"--name: {name!r} becomes a part of the tensors' names: use letters, digits and _")
    base = origin.lasting_name(found.base)
    with written_aside(output) as folder:
        adapterhub.write(folder, adapter.config, found.skeleton, adapter.tensors, base, name)
    return [f"load it with model.load_adapter({str(output)!r}, use_safetensors=True), which calls it {name}"]


def _to_gguf(found: Found, output: Path, server: str | None, name: str) -> list[str]:
    adapter = found.adapter
    assert adapter is not None
    stored: dict[str, Any] = {}
    if adapter.method.exchange is not None:
        _, stored = peft.as_peft(adapter.method, adapter.config, found.skeleton, adapter.tensors)
    temporary = output.with_name(f"{TEMPORARY}{output.name}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        gguf_adapter.write(temporary, adapter.config, found.skeleton, stored, name)
        os.replace(temporary, output)
    except InputError as error:
        raise InputError(f"{error}; {_instead(found)}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return [gguf_adapter.NOTE]


WRITERS: dict[str, Callable[[Found, Path, str | None, str], list[str]]] = {
    "peft": _to_peft,
    "adapterhub": _to_adapterhub,
    "gguf": _to_gguf,
}
