"""Files that were damaged, or made to harm: cut off, changed, lying about themselves, of another base, not finite."""

from __future__ import annotations

import json
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from peftctl import base as bases
from peftctl import checkpoint
from peftctl import model as models
from peftctl.errors import FormatError, InputError
from peftctl.exporting import export
from peftctl.formats import peft, shards
from peftctl.skeleton import Skeleton
from peftctl.storage import MANIFEST
from tests import runs
from tests.cost import seconds
from tests.faults.conftest import Answer, Seen
from tests.test_checkpoint import forge, state

Call = Callable[..., Answer]
# a last argument is where something would be made
COMMANDS: dict[str, list[Any]] = {
    "generate": ["--prompt", "x", "--system"],
    "eval": ["--data", runs.CONFIGS / "data" / "messages.jsonl", "--device"],
    "merge": ["--output"],
    "export": ["--to", "peft", "--output"],
}


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A copy of an adapter, to be spoilt; without checksums, which would tell it first."""
    folder = Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))
    (folder / MANIFEST).unlink()
    return folder


@pytest.fixture(scope="module")
def skeleton(trained: Path) -> Skeleton:
    return models.skeleton(bases.resolve(str(trained / "base")))


def one_line(caught: pytest.ExceptionInfo[FormatError], name: str) -> str:
    text = str(caught.value)
    assert name in text and "\n" not in text
    return text


@pytest.mark.fault(21)
def test_an_adapter_cut_off_anywhere_is_refused_with_its_sizes(adapter: Path, skeleton: Skeleton, seen: Seen) -> None:
    path = adapter / peft.WEIGHTS
    good = path.read_bytes()
    header = 8 + struct.unpack("<Q", good[:8])[0]
    for size in (0, 7, 8, header - 1, header, header + 1, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(FormatError) as caught:
            peft.read(adapter, skeleton)
        found = size - header if size >= header else size
        assert f"{found:,}" in one_line(caught, str(path))
    path.write_bytes(good + b"\0")
    with pytest.raises(FormatError, match=r"bytes of tensors expected"):
        peft.read(adapter, skeleton)
    seen(caught)


def tensor(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def packed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def described(entries: dict[str, Any], data: int) -> bytes:
    return packed(json.dumps(entries).encode(), bytes(data))


TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
HOSTILE = {
    "length of 2^63": packed(b"{}", length=1 << 63),
    "length of 2^64 - 1": packed(b"{}", length=(1 << 64) - 1),
    "overlap": described({"a": tensor("F32", [2], 0, 8), "b": tensor("F32", [2], 4, 12)}, 12),
    "negative": described({"a": tensor("F32", [-1], 0, -4)}, 0),
    "backwards": described({"a": tensor("F32", [1], 4, 0)}, 4),
    "gap": described({"a": tensor("F32", [1], 4, 8)}, 8),
    "shape lies": described({"a": tensor("F32", [1 << 40, 1 << 40], 0, 4)}, 4),
    "shape without end": described({"a": tensor("F32", [1 << 62] * 200_000, 0, 4)}, 4),
    "type lies": described({"a": tensor("F64", [1], 0, 4)}, 4),
    "twice": packed(TWICE, bytes(4)),
    "deep": packed(b"[" * 100_000),
}


def a_million_tensors(path: Path) -> None:
    entry = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    with path.open("wb") as file:
        file.write(bytes(8))
        for start in range(0, 10**6, 10**4):
            block = b",".join(entry % number for number in range(start, start + 10**4))
            file.write((b"," if start else b"{") + block)
        file.write(b"}")
        length = file.tell() - 8
        file.seek(0)
        file.write(struct.pack("<Q", length))


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds that the header of 10,000 tensors takes to be read."""
    folder = tmp_path_factory.mktemp("honest")
    entries = {f"model.layers.{n}.weight": tensor("F32", [1], 4 * n, 4 * n + 4) for n in range(10_000)}
    (folder / shards.SINGLE).write_bytes(described(entries, 40_000))
    return seconds(lambda: shards.shards(folder))


def refused_at_once(read: Callable[[], Any], name: str, honest: float) -> pytest.ExceptionInfo[FormatError]:
    """`honest`: what no refusal may take ten times as long as."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def refused() -> pytest.ExceptionInfo[FormatError]:
        with pytest.raises(FormatError) as caught:
            read()
        one_line(caught, name)
        return caught

    assert seconds(refused) < 10 * honest
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
    return refused()


@pytest.mark.fault(22)
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_lying_header_is_refused_wherever_it_is_read(
    kind: str, adapter: Path, skeleton: Skeleton, honest: float, tmp_path: Path
) -> None:
    (adapter / peft.WEIGHTS).write_bytes(HOSTILE[kind])
    refused_at_once(lambda: peft.read(adapter, skeleton), peft.WEIGHTS, honest)
    path = checkpoint.save(tmp_path, state(1))
    forge(path, "adapter.safetensors", HOSTILE[kind])
    refused_at_once(lambda: checkpoint.load(path), "adapter.safetensors", honest)
    (tmp_path / shards.SINGLE).write_bytes(HOSTILE[kind])
    refused_at_once(lambda: shards.shards(tmp_path), shards.SINGLE, honest)


@pytest.mark.fault(22)
def test_a_million_tensors_are_refused_before_they_are_read(
    adapter: Path, skeleton: Skeleton, honest: float, seen: Seen
) -> None:
    a_million_tensors(adapter / peft.WEIGHTS)
    seen(refused_at_once(lambda: peft.read(adapter, skeleton), peft.WEIGHTS, honest))


@pytest.mark.fault(22)
def test_a_base_with_a_lying_header_is_no_traceback(trained: Path, tmp_path: Path, call: Call) -> None:
    base = Path(shutil.copytree(trained / "base", tmp_path / "base"))
    (base / shards.SINGLE).write_bytes(HOSTILE["overlap"])
    answer = call("merge", trained / "adapter", "--base", base, "--output", tmp_path / "merged")
    assert answer.code in (1, 2) and answer.err.startswith("peftctl: error: ") and shards.SINGLE in answer.err
    assert not (tmp_path / "merged").exists()


@pytest.mark.fault(23)
def test_a_flipped_bit_in_an_adapter_is_told_by_every_command(
    trained: Path, tmp_path: Path, call: Call, seen: Seen
) -> None:
    folder = Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))
    content = bytearray((folder / peft.WEIGHTS).read_bytes())
    content[-100] ^= 4
    (folder / peft.WEIGHTS).write_bytes(content)
    for command in COMMANDS:
        answer = call(command, folder, *COMMANDS[command], tmp_path / "made")
        (line,) = answer.err.splitlines()
        assert answer.code == 2 and answer.out == "" and f"{peft.WEIGHTS}: damaged: sha256" in line
    assert not (tmp_path / "made").exists()
    seen(line.removeprefix("peftctl: error: "))


@pytest.mark.fault(24)
@pytest.mark.parametrize("manifest", [None, b"{", b'{"format": 2, "files": {}}'])
def test_a_checkpoint_without_a_manifest_is_refused_when_it_is_named(
    manifest: bytes | None, trained: Path, tmp_path: Path, call: Call, seen: Seen
) -> None:
    output = Path(shutil.copytree(trained, tmp_path / "run"))
    path = output / "checkpoints" / "step-000002"
    (path / "manifest.json").unlink()
    if manifest is not None:
        (path / "manifest.json").write_bytes(manifest)
    recipe = runs.written(output, runs.document(train={"save_every": 1, "keep": 9}))
    before = {file: file.stat().st_mtime_ns for file in (output / "checkpoints").rglob("*")}
    answer = call("--quiet", "train", recipe, "--resume-from", path)
    (line,) = answer.err.splitlines()
    assert answer.code == 2 and line.startswith(f"peftctl: error: {path / 'manifest.json'}: ")
    assert {file: file.stat().st_mtime_ns for file in (output / "checkpoints").rglob("*")} == before
    seen(line.removeprefix("peftctl: error: "))


@pytest.mark.fault(25)
@pytest.mark.parametrize("command", ["generate", "eval", "merge"])
def test_an_adapter_of_another_base_is_refused_by_its_first_tensors(
    command: str, trained: Path, tmp_path: Path, call: Call, seen: Seen
) -> None:
    runs.train(tmp_path / "other", runs.document(method={"target_modules": "all-linear"}))
    narrow = runs.document()
    config = json.loads((trained / "base" / "config.json").read_text()) | {"hidden_size": 48}
    (tmp_path / "narrow.json").write_text(json.dumps(config))
    narrow["model"] |= {"name": str(tmp_path / "narrow.json")}
    runs.train(tmp_path / "narrow", narrow)
    base = tmp_path / "narrow" / "base"
    own: dict[str, list[Any]] = {
        "generate": ["--prompt", "x"],
        "eval": ["--data", runs.CONFIGS / "data" / "messages.jsonl"],
        "merge": ["--output", tmp_path / "merged"],
    }
    answer = call(command, tmp_path / "other" / "adapter", "--base", base, *own[command])
    lines = answer.err.splitlines()
    assert answer.code == 2 and "does not fit this base: model.layers.0" in lines[-1] and "more" in lines[-1]
    assert answer.out == "" and not (tmp_path / "merged").exists()
    seen(lines[-1].removeprefix("peftctl: error: "))


@pytest.mark.fault(25)
def test_a_base_of_equal_shapes_is_refused_unless_it_is_named(
    trained: Path, tmp_path: Path, call: Call, seen: Seen
) -> None:
    runs.train(tmp_path / "other", runs.document(train={"seed": 1}))
    elsewhere, own = tmp_path / "other" / "base", json.loads((trained / "adapter" / peft.CONFIG).read_text())
    moved = Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))
    (moved / peft.CONFIG).write_text(json.dumps(own | {"base_model_name_or_path": str(elsewhere)}))
    (moved / MANIFEST).unlink()
    for command in COMMANDS:
        answer = call(command, moved, *COMMANDS[command], tmp_path / "made")
        (line,) = answer.err.splitlines()
        assert answer.code == 2 and str(trained / "base") in line and f"{elsewhere} holds other weights" in line
    assert not (tmp_path / "made").exists()
    seen(line.removeprefix("peftctl: error: ").replace(str(trained), "run"))
    answer = call("generate", moved, "--base", elsewhere, "--prompt", "x", "--max-new-tokens", 1)
    assert answer.code == 0 and "holds other weights; going on with what --base names" in answer.err
    begun = runs.document(model={"name": str(elsewhere)}, method={"init_from": str(trained)})
    with pytest.raises(InputError, match=r"method.init_from: .* holds other weights; peftctl export --to peft --base"):
        runs.train(tmp_path / "second", begun)
    export(str(trained), tmp_path / "rewritten", to="peft", base=str(elsewhere))
    begun["method"]["init_from"] = str(tmp_path / "rewritten")
    assert runs.train(tmp_path / "second", begun)["steps"] == 4


@pytest.mark.fault(26)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_not_merged(value: float, adapter: Path, call: Call, seen: Seen) -> None:
    tensors = load_file(adapter / peft.WEIGHTS)
    next(iter(tensors.values())).view(-1)[0] = value
    save_file(tensors, adapter / peft.WEIGHTS, metadata={"format": "pt"})
    answer = call("merge", adapter, "--output", adapter.parent / "merged")
    line = answer.err.splitlines()[-1]
    assert answer.code == 2 and "not finite" in line and not (adapter.parent / "merged").exists()
    seen(line.removeprefix("peftctl: error: "))
