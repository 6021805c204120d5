"""The folder of a run: what it was asked, what it chose by itself, what came out. One process writes it at a time."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peftctl import checkpoint, storage
from peftctl.checkpoint import State
from peftctl.errors import InputError, SaveError
from peftctl.plan import Options, Plan
from peftctl.policy import Layout
from peftctl.recipe import resolved
from peftctl.schema import Recipe

PACKAGES = ("peftctl", "torch", "transformers", "tokenizers", "safetensors")
# what a resumed run may not change: the rest (rate, steps, saving) is the user's to adjust
FIXED = ("model", "method", "objective", "data")
FIXED_TRAIN = ("seed", "batch_size", "gradient_accumulation", "optimizer")


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.document: dict[str, Any] = _read(path / "run.json")

    def finished(self) -> bool:
        return self.document.get("status") == "finished"

    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = self.document["result"]
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One writer at a time. A lock whose process is gone is taken over. Raises InputError."""
        lock = self.path / "lock"
        _make(self.path)
        own = {"pid": os.getpid(), "host": socket.gethostname()}
        holder = _read(lock)
        if holder and holder != own and _alive(holder):
            raise InputError(f"{self.path} is being written by process {holder['pid']} on {holder['host']}")
        storage.write_file(lock, json.dumps(own).encode())
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)

    def open(self, planned: Plan, options: Options, notice: Callable[[str], None]) -> State | None:
        """Make the folder ready; the checkpoint to go on from, None for a fresh run. Raises InputError."""
        if options.resume_from is not None:
            path: Path | None = Path(options.resume_from)
        else:
            path = checkpoint.newest(self.path, notice) if options.resume else None
        if (options.resume or options.resume_from is not None) and path is None:
            if not self.document:
                raise InputError(f"--resume: there is no run in {self.path}; without --resume one is started there")
            notice(f"{self.path} has no checkpoint yet: starting again from step 0")
        state = checkpoint.load(path) if path is not None else None
        if self.document:
            self._reopen(planned, options)
        if state is not None:
            notice(f"going on from step {state.progress.step}")
            checkpoint.rewind(self.path, state.progress.step)
        storage.write_file(self.path / "recipe.yaml", resolved(planned.recipe).encode())
        return state

    def _reopen(self, planned: Plan, options: Options) -> None:
        """The folder holds a run already: it is the one that is resumed, or nothing precious, or refused."""
        if options.resume or options.resume_from is not None:
            changed = changes(self.document["recipe"], planned.recipe, self.document["data"], _data(planned))
            if changed:
                raise InputError(f"{self.path} was another job, so it cannot go on: {'; '.join(changed[:5])}")
        elif self.document.get("random_base"):
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
            shutil.rmtree(self.path / "adapter", ignore_errors=True)
            (self.path / "metrics.jsonl").unlink(missing_ok=True)
            self.document = {}
        else:
            raise InputError(
                f"output: {self.path} holds a run already: --resume goes on with it, --output DIR starts another"
            )

    def layout(self) -> Layout | None:
        """The layout that the run chose when it began, to be used again."""
        chosen = self.document.get("choices", {}).get("layout")
        return Layout(**chosen) if chosen else None

    def record(self, planned: Plan, layout: Layout, choices: dict[str, Any], random_base: bool) -> None:
        """Write down what the run is, before its first step."""
        base = planned.base
        self.document = {
            "status": "running",
            "versions": versions(),
            "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
            "base": {"name": base.name, "revision": base.revision},
            "random_base": random_base,
            "data": _data(planned),
            "counts": planned.counts.document(by_module=False),
            "choices": {"layout": layout._asdict(), **choices},
            "recipe": _plain(planned.recipe),
        }
        self.write()

    def write(self) -> None:
        storage.write_file(self.path / "run.json", (json.dumps(self.document, indent=2) + "\n").encode())

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        self.document |= {"status": "finished", "result": result}
        self.write()
        return result


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `target` in one rename when all went well, and is removed when not."""
    temporary = target.with_name(f"{storage.TEMPORARY}{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    _make(temporary)
    try:
        yield temporary
        storage.remove(target)
        os.replace(temporary, target)
    except OSError as error:
        raise SaveError(f"{target} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def changes(before: dict[str, Any], now: Recipe, data_before: Any, data_now: Any) -> list[str]:
    """What differs between a run's recipe and today's in what may not differ, as `key: before -> now`."""
    after = _plain(now)
    found = []
    for block in FIXED:
        found += _differences(block, before[block], after[block])
    for key in FIXED_TRAIN:
        found += _differences(f"train.{key}", before["train"][key], after["train"][key])
    found += _differences("the data's content", data_before, data_now)
    return found


def _differences(key: str, before: Any, now: Any) -> list[str]:
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys((*before, *now))
        return [line for k in keys for line in _differences(f"{key}.{k}", before.get(k), now.get(k))]
    return [f"{key}: {before!r} -> {now!r}"]


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "from source"
    return found


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _data(planned: Plan) -> dict[str, Any]:
    sets = {"train": planned.data.train, "validation": planned.data.validation}
    return {
        name: {"file": data.name, "sha256": data.fingerprint, "examples": len(data)}
        for name, data in sets.items()
        if data is not None
    }


def _plain(recipe: Recipe) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(recipe.model_dump_json())
    return document


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output: {path} cannot be made: {error.strerror}") from error


def _alive(holder: dict[str, Any]) -> bool:
    """Whether the process that holds a lock still runs; on another machine nobody can tell, so yes."""
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(holder.get("pid", 0)), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
