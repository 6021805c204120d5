"""What the fuzzer feeds: each reader of files from strangers. It may refuse them in one of our errors, no more.

A traceback, five seconds or a gigabyte is a failure.
"""

from __future__ import annotations

import json
import resource
import shutil
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import strategies as st

from peftctl import base as bases
from peftctl import model as models
from peftctl import objectives, recipe
from peftctl.data.chat import Chat
from peftctl.data.dataset import load
from peftctl.errors import PeftctlError
from peftctl.formats import origin, peft, shards
from peftctl.row import Message
from peftctl.skeleton import Skeleton
from tests import runs
from tests.faults import inputs

SECONDS, BYTES = 5.0, 1 << 30


class Failure(Exception):
    """What no reader may do."""


class _Late(BaseException):
    """Not for any `except Exception` on the way."""


class Target(NamedTuple):
    inputs: st.SearchStrategy[bytes]
    read: Callable[[bytes, Path], Any]  # in an empty folder


def judge(name: str, data: bytes) -> str:
    """`read`, or the words of the refusal. Raises Failure for anything else."""
    with tempfile.TemporaryDirectory(prefix="peftctl-fuzz-") as folder:
        try:
            with _bounds():
                TARGETS[name].read(data, Path(folder))
        except PeftctlError as error:
            return str(error)
        except _Late:
            raise Failure(f"{name}: not done after {SECONDS:g} s") from None
        except Exception as error:
            raise Failure(f"{name}: {type(error).__name__}: {str(error)[:300]}") from error
    return "read"


@contextmanager
def _bounds() -> Iterator[None]:
    """Five seconds of this process's time and a gigabyte beyond what it holds."""

    def late(*_: Any) -> None:
        raise _Late

    before = signal.signal(signal.SIGPROF, late)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS, SECONDS / 10)  # the first may be lost in the collector
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


# ---- what is right, to be spoilt -----------------------------------------------------------------------------------


@cache
def _run() -> Path:
    """A small run of LoRA and its base."""
    output = Path(tempfile.mkdtemp(prefix="peftctl-fuzzed-")) / "run"
    runs.train(output, runs.document(train={"max_steps": 1}))
    return output


@cache
def _skeleton() -> Skeleton:
    return models.skeleton(bases.resolve(str(_run() / "base")))


@cache
def _chat() -> Chat:
    return Chat(runs.CONFIGS / "tokenizer")


def _files(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(runs.CONFIGS.parent.glob(name))]


def _json(path: Path) -> Any:
    return json.loads(path.read_bytes())


# ---- the readers ---------------------------------------------------------------------------------------------------


def _recipe(data: bytes, folder: Path) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(data)
    recipe.load(path)


def _header(data: bytes, folder: Path) -> None:
    path = folder / shards.SINGLE
    path.write_bytes(data)
    shards.shards(folder)
    shutil.copytree(_run() / "adapter", folder / "adapter")
    (folder / "adapter" / peft.WEIGHTS).write_bytes(data)
    peft.read(folder / "adapter", _skeleton())


def _rows(data: bytes, folder: Path) -> None:
    path = folder / "rows.jsonl"
    path.write_bytes(data)
    for objective in ("sft", "dpo", "kto"):
        found = objectives.get(objective)
        try:
            load(path, _chat(), found, found.config(name=objective), on_bad_row="skip")
        except PeftctlError:
            if objective == "kto":
                raise


def _template(data: bytes, folder: Path) -> None:
    shutil.copytree(runs.CONFIGS / "tokenizer", folder / "tokenizer")
    (folder / "tokenizer" / "chat_template.jinja").write_bytes(data)
    chat = Chat(folder / "tokenizer")
    messages = [Message("user", "How many legs?"), Message("assistant", "Eight.")]
    chat.dialogue(messages)
    chat.render_prompt(messages[:1])


def _adapter(data: bytes, folder: Path) -> None:
    """An adapter's config: the first byte says which file is spoilt, and whether ours is there."""
    shutil.copytree(_run() / "adapter", folder / "adapter")
    name = peft.OURS if data[:1] == b"o" else peft.CONFIG
    (folder / "adapter" / name).write_bytes(data[1:])
    if data[:1] == b"p":
        (folder / "adapter" / peft.OURS).unlink()
    origin.base_of(folder / "adapter")
    peft.read(folder / "adapter", _skeleton())


def _tokenizer(data: bytes, folder: Path) -> None:
    shutil.copytree(runs.CONFIGS / "tokenizer", folder / "tokenizer")
    (folder / "tokenizer" / "tokenizer_config.json").write_bytes(data)
    Chat(folder / "tokenizer").completion("a", "b")


def _index(data: bytes, folder: Path) -> None:
    (folder / shards.INDEX).write_bytes(data)
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(struct.pack("<Q", 2) + b"{}")
    shards.shards(folder)


def _base(data: bytes, folder: Path) -> None:
    path = folder / "model.json"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTCTL_CACHE", str(folder / "cache"))
        models.skeleton(bases.resolve(str(path), need="config"))


def _configs() -> st.SearchStrategy[bytes]:
    adapter = _run() / "adapter"
    peft_keys = ["modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform", "target_parameters", "bias"]
    theirs = {"config": {"architecture": None, "mh_adapter": True}, "model_name": "x", "hidden_size": 64}
    ours = inputs.documents([_json(adapter / peft.OURS)]).map(inputs.encoded)
    plain = inputs.documents([_json(adapter / peft.CONFIG), theirs], peft_keys).map(inputs.encoded)
    either = st.tuples(st.sampled_from([b"c", b"p"]), plain).map(b"".join)
    return st.one_of(ours.map(lambda text: b"o" + text), either)


def _tensors() -> st.SearchStrategy[bytes]:
    whole = (_run() / "adapter" / peft.WEIGHTS).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    return inputs.tensor_files(json.loads(whole[8 : 8 + length]), whole[8 + length :])


def _lines() -> st.SearchStrategy[bytes]:
    files = _files("configs/data/*.jsonl")
    rows = [json.loads(line) for file in files for line in file.splitlines()]
    some = st.lists(inputs.documents(rows).map(inputs.encoded), max_size=4).map(b"\n".join)
    return st.one_of(some, inputs.spliced([b"\n".join(file.splitlines()[:2]) for file in files]))


def _tiny() -> list[Path]:
    return sorted((runs.CONFIGS / "models").glob("tiny-*.json"))


INDEX = {"metadata": {"total_size": 0}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
TARGETS: dict[str, Target] = {
    "recipe": Target(st.deferred(lambda: inputs.spliced(_files("recipes/s*.yaml"))), _recipe),
    "header": Target(st.deferred(_tensors), _header),
    "index": Target(inputs.documents([INDEX]).map(inputs.encoded), _index),
    "rows": Target(st.deferred(_lines), _rows),
    "template": Target(inputs.TEMPLATES, _template),
    "adapter": Target(st.deferred(_configs), _adapter),
    "base": Target(st.deferred(lambda: inputs.documents([_json(path) for path in _tiny()]).map(inputs.encoded)), _base),
    "tokenizer": Target(
        st.deferred(
            lambda: inputs.documents([_json(runs.CONFIGS / "tokenizer" / "tokenizer_config.json")]).map(inputs.encoded)
        ),
        _tokenizer,
    ),
}
