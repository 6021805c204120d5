"""Checkpoints of a run, at optimizer steps only: whole, verified, exact to the bit, of tensors and JSON alone.

runs/NAME/checkpoints/step-000100/ holds adapter, optimizer and rng (where there are such, also the frozen reference and
the best adapter) as safetensors, state.json with the progress, and manifest.json, written last. torch is imported where
tensors are touched.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peftctl import storage
from peftctl.errors import FormatError
from peftctl.formats import shards

if TYPE_CHECKING:
    from torch import Tensor

TENSORS = ("adapter", "optimizer", "rng", "reference", "best")  # each a safetensors file, of the last two if there
REQUIRED = ("adapter.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")


class Progress(NamedTuple):
    """How far a run is. `position`: where its data goes on, by default the number of examples consumed; `seconds`: the
    time spent on all of it; `skipped`: how many of the last steps in a row were passed over, because a loss or a
    gradient was not finite.
    """

    step: int = 0
    position: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0


@dataclass(frozen=True)
class State:
    """All that a run needs to go on as if it had never stopped. `facts` and `optimizer_facts` are plain JSON."""

    progress: Progress
    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    optimizer_facts: Mapping[str, Any]
    rng: Mapping[str, Tensor]
    reference: Mapping[str, Tensor] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    best: Mapping[str, Tensor] | None = None  # the adapter at the best evaluation, where it is kept


def folder(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step-{step:06d}"


def save(run_folder: Path, state: State) -> Path:
    """Write a checkpoint and read it back. Raises SaveError or FormatError; earlier checkpoints are not touched."""
    target = folder(run_folder, state.progress.step)
    groups = {name: tensors for name in TENSORS if (tensors := getattr(state, name)) is not None}
    files: dict[str, storage.Content] = {f"{name}.safetensors": _writer(group) for name, group in groups.items()}
    document = {
        "progress": state.progress._asdict(),
        "optimizer": dict(state.optimizer_facts),
        "facts": dict(state.facts),
    }
    files["state.json"] = (json.dumps(document, indent=2) + "\n").encode()
    storage.write_folder(target, files, expected=sum(t.nbytes for group in groups.values() for t in group.values()))
    verify(target)
    return target


def verify(path: Path) -> storage.Manifest:
    """Check that a folder is a whole, undamaged checkpoint, without opening a tensor. Raises FormatError."""
    manifest = storage.verify(path)
    missing = [name for name in REQUIRED if name not in manifest.files]
    if missing:
        raise FormatError(f"{path}: not a checkpoint: its manifest lists no {missing[0]}")
    return manifest


def load(path: Path) -> State:
    """A checkpoint, verified before anything of it is opened. Raises FormatError."""
    manifest = verify(path)
    document = _read_json(path / "state.json")
    reference, best = path / "reference.safetensors", path / "best.safetensors"
    return State(
        progress=document["progress"],
        adapter=_read(path / "adapter.safetensors"),
        optimizer=_read(path / "optimizer.safetensors"),
        optimizer_facts=document["optimizer"],
        rng=_read(path / "rng.safetensors"),
        reference=_read(reference) if reference.name in manifest.files else None,
        facts=document["facts"],
        best=_read(best) if best.name in manifest.files else None,
    )


def newest(run_folder: Path, notice: Callable[[str], None] = lambda text: None) -> Path | None:
    """The newest whole checkpoint of a run, after cleaning up what a crash left; damaged ones go to `notice`."""
    parent = run_folder / "checkpoints"
    if parent.is_dir():
        storage.tidy(parent)
    for path in reversed(_all(run_folder)):
        try:
            verify(path)
        except FormatError as error:
            notice(f"checkpoint {path.name} is skipped: {error}")
        else:
            return path
    return None


def rotate(run_folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; to be called once the newest is verified, as `save` does."""
    for path in _all(run_folder)[:-keep]:
        storage.remove(path)


def rewind(run_folder: Path, step: int) -> None:
    """Remove the checkpoints after a step: what a run that goes on from there has not yet done."""
    for path in _all(run_folder):
        if _step(path) > step:
            storage.remove(path)


def random_state() -> dict[str, Tensor]:
    """The state of every random generator a run may draw from, as bytes."""
    import torch

    states = {"torch": torch.get_rng_state(), "python": _python_state()}
    if torch.cuda.is_available():
        states |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_random(states: Mapping[str, Tensor]) -> None:
    """Set the generators back; those of devices that this machine lacks are passed over."""
    import torch

    torch.set_rng_state(states["torch"])
    version, internal, gauss = json.loads(bytes(states["python"].tolist()))
    random.setstate((version, tuple(internal), gauss))
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda.{index}"], index)
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])


def _python_state() -> Tensor:
    import torch

    return torch.tensor(list(json.dumps(random.getstate()).encode()), dtype=torch.uint8)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _all(run_folder: Path) -> list[Path]:
    """Every checkpoint folder, oldest first, whole or not."""
    found = (run_folder / "checkpoints").glob("step-*")
    return sorted((path for path in found if path.is_dir() and path.name[5:].isdecimal()), key=_step)


def _writer(tensors: Mapping[str, Tensor]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            # contiguous and apart: the format stores neither strides nor shared memory
            save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, path)
        except SafetensorError as error:  # how the library reports a full disk
            raise OSError(str(error)) from error

    return write


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    shards.read(path)  # its header is refused here before anything of the size that it claims is made
    try:
        return load_file(path)
    except SafetensorError as error:
        raise FormatError(f"{path}: not a safetensors file: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    """state.json, with its progress as such."""
    try:
        document = json.loads(path.read_bytes())
        progress = Progress(**document["progress"])
        return {"progress": progress, "optimizer": document["optimizer"], "facts": document["facts"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{path}: not the state of a run: {error!r}") from None
