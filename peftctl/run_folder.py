"""The folder of a run: what it was asked, what it chose by itself, what came out. One process writes it at a time."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peftctl import base as bases
from peftctl import checkpoint, storage
from peftctl.checkpoint import State
from peftctl.data.encoded import Dataset
from peftctl.errors import InputError, SaveError
from peftctl.plan import Options, Plan
from peftctl.policy import Layout
from peftctl.recipe import resolved
from peftctl.schema import Recipe

PACKAGES = ("peftctl", "torch", "transformers", "tokenizers", "safetensors")
# what a resumed run may not change: the rest (rate, steps, saving) is the user's to adjust
FIXED = ("model", "method", "objective", "data")
FIXED_TRAIN = ("seed", "optimizer")


class RunFolder:
    """`origin`: what run.json says of the run that is gone on with, here or in the folder of `--resume-from`."""

    def __init__(self, path: Path, options: Options) -> None:
        self.path = path
        self.document: dict[str, Any] = _read(path / "run.json")
        self.trusted = options.trust_remote_code
        self.goes_on = options.resume or options.resume_from is not None
        self.origin = self.document if self.goes_on else {}
        if options.resume_from is not None:
            source = Path(options.resume_from).resolve().parent.parent
            if source != path.resolve():
                self.origin = _read(source / "run.json")
        self._present(options)

    def _present(self, options: Options) -> None:
        """Refuse to go on with what is not there, before a folder is made for it. Raises InputError."""
        if options.resume_from is not None and not Path(options.resume_from).is_dir():
            raise InputError(f"--resume-from: there is no folder {options.resume_from}")
        if options.resume and not self.document and not (self.path / "checkpoints").is_dir():
            raise self._nothing()

    def _nothing(self) -> InputError:
        return InputError(f"--resume: there is no run in {self.path}; without --resume one is started there")

    def finished(self, planned: Plan) -> bool:
        """Whether this very job is done; one with more steps, say, is not."""
        if self.document.get("status") != "finished":
            return False
        before, now = ({**recipe, "output": ""} for recipe in (self.document["recipe"], _plain(planned.recipe)))
        same_code = self.document.get("code", {}) == planned.code
        return before == now and self.document["data"] == _data(planned) and same_code

    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = self.document["result"]
        return found

    def open(self, planned: Plan, options: Options, notice: Callable[[str], None]) -> State | None:
        """Make the folder ready; the checkpoint to go on from, None for a fresh run. Raises InputError."""
        path = None if options.resume_from is None else Path(options.resume_from)
        if options.resume and path is None:
            path = checkpoint.newest(self.path, notice)
        if self.goes_on and path is None:
            if not self.document:
                raise self._nothing()
            notice(f"{self.path} has no checkpoint yet: starting again from step 0")
        state = checkpoint.load(path) if path is not None else None
        self._reopen(planned, notice)
        if state is not None:
            notice(f"going on from step {state.progress.step}")
        self._rewind(state.progress.step if state is not None else 0, notice)
        checkpoint.rotate(self.path, planned.recipe.train.keep)  # a kill may have come before the last save's own
        storage.write_file(self.path / "recipe.yaml", resolved(planned.recipe).encode())
        return state

    def _rewind(self, step: int, notice: Callable[[str], None]) -> None:
        """Drop the checkpoints after a step: their steps are about to be done again, perhaps otherwise."""
        before = self._checkpoints()
        checkpoint.rewind(self.path, step)
        gone = sorted(before - self._checkpoints())
        if gone:
            notice(f"removed {', '.join(gone)}: what comes after step {step} is done again")

    def _checkpoints(self) -> set[str]:
        return {path.name for path in (self.path / "checkpoints").glob("step-*")}

    def _reopen(self, planned: Plan, notice: Callable[[str], None]) -> None:
        """What the folder holds is the run that is gone on with, or nothing precious, or refused."""
        if self.origin:
            changed = changes(self.origin, planned)
            if changed:
                raise InputError(f"{self.path} was another job, so it cannot go on: {'; '.join(changed[:5])}")
            for line in _differences("train", self.origin["recipe"]["train"], _plain(planned.recipe)["train"]):
                notice(f"changed since the run began: {line}")
        if self.goes_on and self.origin is self.document:
            return
        if self.document.get("random_base"):
            for name in ("checkpoints", "adapter", "base", "merged"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            (self.path / "metrics.jsonl").unlink(missing_ok=True)
            self.document = {}
        elif self.document or self._checkpoints():
            raise InputError(
                f"output: {self.path} holds a run already: --resume goes on with it, --output DIR starts another"
            )

    def choice(self, name: str) -> Any:
        """What the run that is gone on with chose by itself; None for a fresh one."""
        return self.origin.get("choices", {}).get(name)

    def now(self) -> datetime | None:
        """The moment that chat templates were told."""
        told = self.choice("now")
        return datetime.fromisoformat(told) if told else None

    def layout(self) -> Layout | None:
        """The layout that the run chose when it began, to be used again."""
        chosen = self.choice("layout")
        return Layout(**chosen) if chosen else None

    def record(self, planned: Plan, layout: Layout, choices: dict[str, Any], random_base: bool) -> None:
        """Write down what the run is, before its first step."""
        base = planned.base
        self.document = {
            "status": "running",
            "versions": versions(),
            "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
            "base": {"name": base.name, "revision": base.revision, "fingerprint": bases.fingerprint(base)},
            "random_base": random_base,
            "trust_remote_code": self.trusted,
            "data": _data(planned),
            "code": planned.code,
            "reference": _other_model(planned),
            "counts": planned.counts.document(by_module=False),
            "choices": {"layout": layout._asdict(), **choices, "now": _now(planned)},
            "recipe": _plain(planned.recipe),
        }
        self.write()

    def stopped(self) -> None:
        self.document["status"] = "stopped"
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
        storage.publish(temporary, target)
    except OSError as error:
        raise SaveError(f"{target} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def changes(before: dict[str, Any], planned: Plan) -> list[str]:
    """What differs between a run and today's plan in what may not differ, as `key: before -> now`."""
    recipe, after = before["recipe"], _plain(planned.recipe)
    found = []
    for block in FIXED:
        # a revision may be pinned later, to what it was
        found += _differences(block, *({**blocks[block], "revision": None} for blocks in (recipe, after)))
    for key in FIXED_TRAIN:
        found += _differences(f"train.{key}", recipe["train"].get(key), after["train"][key])
    if _examples(recipe["train"]) != _examples(after["train"]):  # how they are cut into micro-batches may change
        for key in ("batch_size", "gradient_accumulation"):
            found += _differences(f"train.{key}", recipe["train"].get(key), after["train"][key])
    found += _differences("the data's content", before["data"], _data(planned))
    found += _differences("the reference's content", before.get("reference"), _other_model(planned))
    found += _differences("the content of", before.get("code", {}), planned.code)
    if not before["random_base"]:
        base = before["base"]
        found += _differences("model.revision", base["revision"], planned.base.revision)
        found += _differences("the base's content", base.get("fingerprint"), bases.fingerprint(planned.base))
    return found


def _examples(settings: dict[str, Any]) -> int:
    """Examples of an optimizer step."""
    return int(settings["batch_size"]) * int(settings["gradient_accumulation"])


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
    found: dict[str, Any] = {name: _content(data) for name, data in sets.items() if data is not None}
    template = planned.chat.template
    return found if template is None else found | {"chat_template": sha256(template.source.encode()).hexdigest()}


def _content(data: Dataset) -> dict[str, Any]:
    if data.origins:
        sources = {str(number): origin._asdict() for number, origin in enumerate(data.origins, 1)}
        return {"sources": sources, "examples": len(data)}
    return {"file": data.name, "sha256": data.fingerprint, "examples": len(data)}


def _other_model(planned: Plan) -> str | None:
    """The fingerprint of the model that the policy is compared with, where that is a model of its own."""
    return bases.fingerprint(planned.reference) if isinstance(planned.reference, bases.Base) else None


def _now(planned: Plan) -> str | None:
    template = planned.chat.template
    return None if template is None else template.now.isoformat()


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
