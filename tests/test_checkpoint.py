"""Checkpoints are there whole or not at all, whatever happens in the middle of a save, and come back to the bit."""

import errno
import json
import os
import random
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peftctl import checkpoint, storage
from peftctl.checkpoint import Progress, State
from peftctl.errors import FormatError, SaveError


def state(step: int, reference: bool = False) -> State:
    generator = torch.Generator().manual_seed(step)
    tensors = {"layers.0.q.a": torch.randn(3, 4, generator=generator), "b": torch.tensor([1e-42, float("nan"), -0.0])}
    return State(
        progress=Progress(step, 8 * step, 1000 * step, 0.1 * step),
        adapter=tensors,
        optimizer={"exp_avg.b": torch.randn(3, generator=generator), "step.b": torch.tensor(float(step))},
        optimizer_facts={"optimizer": "AdamW"},
        rng=checkpoint.random_state(),
        reference={"b": torch.zeros(3, dtype=torch.bfloat16)} if reference else None,
        facts={"layout": "shared"},
    )


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def same(a: State, b: State) -> bool:
    def key(s: State) -> list[Any]:
        groups = [s.adapter, s.optimizer, s.rng, s.reference or {}]
        return [{n: bits(t) for n, t in group.items()} for group in groups]

    plain = [(s.progress, dict(s.optimizer_facts), dict(s.facts), s.reference is None) for s in (a, b)]
    return plain[0] == plain[1] and key(a) == key(b)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("reference", [False, True])
def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path, reference: bool) -> None:
    before = state(100, reference)
    path = checkpoint.save(tmp_path, before)
    assert path == tmp_path / "checkpoints" / "step-000100"
    expected = {"adapter.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"}
    assert set(content(path)) == expected | ({"reference.safetensors"} if reference else set())
    assert same(checkpoint.load(path), before)


def test_views_and_shared_memory_are_saved_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": base.T, "row": base[1], "again": base[1]}
    path = checkpoint.save(tmp_path, State(Progress(1), tensors, {}, {}, checkpoint.random_state()))
    assert {n: t.tolist() for n, t in checkpoint.load(path).adapter.items()} == {
        n: t.tolist() for n, t in tensors.items()
    }


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    torch.manual_seed(3)
    random.seed(3)
    random.gauss(0, 1)  # leaves a second number behind, which belongs to the state
    path = checkpoint.save(tmp_path, state(1))
    expected = torch.rand(5).tolist(), random.gauss(0, 1), random.random()
    torch.manual_seed(9)
    random.seed(9)
    checkpoint.restore_random(checkpoint.load(path).rng)
    assert (torch.rand(5).tolist(), random.gauss(0, 1), random.random()) == expected


# Every point at which a save touches the disk. `at` counts them; the chosen one fails, or ends the process.
POINTS = [(os, "replace"), (os, "fsync"), (Path, "write_bytes"), (Path, "mkdir"), (shutil, "rmtree")]


def inject(monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[], None], after: bool) -> list[str]:
    seen: list[str] = []

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            mine = len(seen) == at
            if mine and not after:
                act()
            result = original(*args, **kwargs)
            if mine and after:
                act()
            return result

        monkeypatch.setattr(owner, name, wrapped)

    for owner, name in POINTS:
        wrap(owner, name)
    return seen


def fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def save_and_rotate(folder: Path, step: int) -> None:
    checkpoint.save(folder, state(step))
    checkpoint.rotate(folder, keep=2)


def points() -> Iterator[tuple[int, bool]]:
    return ((at, after) for at in range(1, 40) for after in (False, True))


@pytest.mark.parametrize("step", [30, 20], ids=["new", "replacing"])
@pytest.mark.fault(11)
def test_process_killed_at_any_point_of_a_save_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    kills = 0
    for at, after in points():
        folder = tmp_path / f"{at}-{after}"
        for done in (10, 20):
            checkpoint.save(folder, state(done))
        before = content(folder / "checkpoints")
        child = os.fork()
        if child == 0:
            inject(monkeypatch, at, lambda: os._exit(9), after)
            save_and_rotate(folder, step)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        kills += 1
        notices: list[str] = []
        path = checkpoint.newest(folder, notices.append)
        assert path is not None and path.name in ("step-000020", "step-000030") and not notices
        assert checkpoint.load(path).progress.step == int(path.name[5:])
        now = content(folder / "checkpoints")
        if path.name == "step-000020" and step == 30:
            assert now == before, "the earlier ones are as they were, and no leftover stays"
        assert not [p for p in (folder / "checkpoints").iterdir() if p.name.startswith(".")]
    assert kills > 25


@pytest.mark.parametrize("step", [20, 10], ids=["new", "replacing"])
@pytest.mark.fault(16, 19)
def test_failure_at_any_point_is_an_error_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(f"{__name__}.POINTS", POINTS[:-1])  # cleaning up ignores its own failures
    failures = 0
    for at in range(1, 40):
        folder = tmp_path / str(at)
        checkpoint.save(folder, state(10))
        before = content(folder)
        with monkeypatch.context() as patch:
            seen = inject(patch, at, fail, after=False)
            try:
                checkpoint.save(folder, state(step))
            except SaveError as error:
                failures += 1
                assert "Input/output error" in str(error) and "bytes needed" in str(error)
            else:
                assert len(seen) < at, "a failed write was reported as saved"
                break
        now = content(folder)
        assert {name: now[name] for name in before} == before or step == 10
        assert checkpoint.load(checkpoint.folder(folder, 10)).progress.step == 10
        assert not [p for p in (folder / "checkpoints").iterdir() if p.name.startswith(".tmp")]
        found = checkpoint.newest(folder)
        assert found is not None and checkpoint.load(found).progress.step in (10, 20)
    assert failures > 10


@pytest.mark.fault(16)
def test_full_disk_says_what_is_needed_and_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the size of files stands for the disk: it fails inside safetensors, which has errors of its own."""
    checkpoint.save(tmp_path, state(1))
    before = content(tmp_path)
    large = State(Progress(2), {"a": torch.zeros(1 << 18)}, {}, {}, checkpoint.random_state())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, limits[1]))
    try:
        with pytest.raises(SaveError, match=r"step-000002: .*too large.*; 1,0\d\d,\d+ bytes needed, [\d,]+ free"):
            checkpoint.save(tmp_path, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(tmp_path) == before


def test_run_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(SaveError, match="cannot write"):
        checkpoint.save(tmp_path / "run", state(1))
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"])
@pytest.mark.fault(21, 23)
def test_every_damage_is_seen_and_named(tmp_path: Path, name: str) -> None:
    path = checkpoint.save(tmp_path, state(1))
    good = (path / name).read_bytes()
    header = 8 + struct.unpack("<Q", good[:8])[0] if name.endswith(".safetensors") else 10
    for size in {0, 7, 8, header - 1, header + 1, len(good) // 2, len(good) - 1}:
        (path / name).write_bytes(good[:size])
        with pytest.raises(FormatError, match=f"{name}: {size} bytes found, {len(good)} expected"):
            checkpoint.load(path)
    (path / name).write_bytes(good + b"\0")
    with pytest.raises(FormatError, match=f"{name}: {len(good) + 1} bytes found"):
        checkpoint.load(path)
    for at in {0, 8, header, len(good) // 2, len(good) - 1} & set(range(len(good))):
        flipped = bytearray(good)
        flipped[at] ^= 1
        (path / name).write_bytes(flipped)
        with pytest.raises(FormatError, match=f"{name}: damaged: sha256 .* found, .* expected"):
            checkpoint.load(path)
    (path / name).unlink()
    with pytest.raises(FormatError, match=f"{name}: missing"):
        checkpoint.load(path)


def forge(path: Path, name: str, data: bytes) -> None:
    """Put other bytes into a checkpoint, and a manifest that vouches for them."""
    files: dict[str, storage.Content] = {p.name: p.read_bytes() for p in path.iterdir() if p.name != storage.MANIFEST}
    storage.write_folder(path, files | {name: data})


def tensors_file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


HOSTILE = {
    "length of 2^63": tensors_file(b"{}", length=1 << 63),
    "length beyond the file": tensors_file(b"{}", length=1 << 40),
    "no JSON": tensors_file(b"{{"),
    "overlap": tensors_file(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"\0" * 4,
    ),
    "shape lies": tensors_file(
        b'{"a":{"dtype":"F32","shape":[1073741824],"data_offsets":[0,4]}}', b"\0" * 4
    ),
    "a pickle": b"\x80\x04\x95cposix\nsystem\n(S'touch canary'\ntR.",
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.fault(22, 27)
def test_hostile_tensors_are_refused_even_with_a_right_manifest(tmp_path: Path, kind: str) -> None:
    path = checkpoint.save(tmp_path, state(1))
    forge(path, "optimizer.safetensors", HOSTILE[kind])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=r"optimizer\.safetensors(:| is) "):
        checkpoint.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize("data", [b"[]", b"{}", b'{"progress": {"step": 1, "rows": 3}}', b"\xff", b"[" * 100_000])
def test_state_that_is_none_is_refused(tmp_path: Path, data: bytes) -> None:
    path = checkpoint.save(tmp_path, state(1))
    forge(path, "state.json", data)
    with pytest.raises(FormatError, match=r"state\.json: not the state of a run"):
        checkpoint.load(path)


MANIFESTS = {
    "missing": (None, "manifest.json: missing; the folder was not written whole"),
    "empty": (b"", "manifest.json: not valid JSON"),
    "cut": (b'{"format": 1, "fil', "manifest.json: not valid JSON"),
    "deep": (b"[" * 100_000, "manifest.json: not valid JSON"),
    "huge": (b" " * (5 << 20), "manifest.json: 5242880 bytes found"),
    "list": (b"[]", "manifest.json: not a manifest"),
    "no files": (b'{"format": 1}', "each file needs a size and a sha256"),
    "newer": (b'{"format": 99, "files": {}}', "format 99 found, this version reads up to 1; update peftctl"),
    "outside": (b'{"format": 1, "files": {"../x": {"size": 1, "sha256": "0"}}}', "'../x' leads out of the folder"),
    "not ours": (b'{"format": 1, "files": {}}', "not a checkpoint: its manifest lists no adapter.safetensors"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
@pytest.mark.fault(24)
def test_bad_manifest_is_refused_by_name_and_skipped_with_a_notice(tmp_path: Path, kind: str) -> None:
    data, message = MANIFESTS[kind]
    older = checkpoint.save(tmp_path, state(1))
    path = checkpoint.save(tmp_path, state(2))
    (path / "manifest.json").unlink()
    if data is not None:
        (path / "manifest.json").write_bytes(data)
    with pytest.raises(FormatError) as caught:
        checkpoint.load(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    notices: list[str] = []
    assert checkpoint.newest(tmp_path, notices.append) == older
    assert len(notices) == 1 and notices[0].startswith("checkpoint step-000002 is skipped: ") and message in notices[0]


def test_newest_goes_by_number_past_all_that_is_damaged(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    for step in (9, 10, 1_000_000, 2_000_000):
        path = checkpoint.save(tmp_path, state(step))
    data = bytearray((path / "adapter.safetensors").read_bytes())
    data[-1] ^= 128
    (path / "adapter.safetensors").write_bytes(data)
    (tmp_path / "checkpoints" / "step-notes").mkdir()
    notices: list[str] = []
    assert checkpoint.newest(tmp_path, notices.append) == tmp_path / "checkpoints" / "step-1000000"
    assert "step-2000000 is skipped" in notices[0] and "adapter.safetensors: damaged" in notices[0]


def test_missing_folder_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="step-000007: no such folder"):
        checkpoint.load(checkpoint.folder(tmp_path, 7))


def test_rotation_keeps_the_newest_and_rewinding_drops_what_comes_after(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 10):
        checkpoint.save(tmp_path, state(step))
    checkpoint.rotate(tmp_path, keep=3)
    names = lambda: sorted(p.name for p in (tmp_path / "checkpoints").iterdir())  # noqa: E731
    assert names() == ["step-000003", "step-000004", "step-000010"]
    checkpoint.rewind(tmp_path, 3)
    assert names() == ["step-000003"]


def test_checkpoint_half_removed_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step))

    def interrupted(folder: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            (folder / "adapter.safetensors").unlink()
            fail()

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(SaveError, match=r"cannot remove .*step-000002: Input/output error"):
            checkpoint.rewind(tmp_path, 1)
    notices: list[str] = []
    assert checkpoint.newest(tmp_path, notices.append) == checkpoint.folder(tmp_path, 1) and not notices
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file, the manifest after them, their folder; then the name; then the folder that holds the name."""
    order: list[str] = []
    fsync, rename = os.fsync, os.replace
    parent = tmp_path / "checkpoints"

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        order.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(f"{parent}/"))

    def renamed(source: Path, target: Path) -> None:
        rename(source, target)
        order.append(f"{source.name} -> {target.name}")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    checkpoint.save(tmp_path, state(1))
    files = ["adapter.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"]
    aside = ".tmp-step-000001"
    assert order == [*(f"{aside}/{name}" for name in files), aside, f"{aside} -> step-000001", str(parent)]


def test_folder_written_over_another_replaces_it_whole(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    storage.write_folder(target, {"old": b"1", "both": b"2"})
    manifest = storage.write_folder(target, {"both": b"3", "new": lambda path: path.write_text("4") and None})
    assert set(content(target)) == {"both", "new", "manifest.json"}
    assert storage.verify(target) == manifest and manifest.files["new"].size == 1
    assert json.loads((target / "manifest.json").read_text())["format"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.fault(19)
def test_folder_filled_aside_is_published_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, temporary = tmp_path / "adapter", tmp_path / ".tmp-adapter"
    for text in ("old", "new"):
        (temporary / "nested").mkdir(parents=True)
        (temporary / "nested" / "file").write_text(text)
        if text == "new":
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", lambda descriptor: fail())
                with pytest.raises(SaveError, match=r"cannot write .*adapter: Input/output error; 3 bytes needed"):
                    storage.publish(temporary, target)
            assert content(target) == {"nested/file": b"old"}
        storage.publish(temporary, target)
        assert content(tmp_path) == {"adapter/nested/file": text.encode()}
    storage.remove(target)
    storage.remove(target)
    assert list(tmp_path.iterdir()) == []


def test_writer_that_breaks_leaves_nothing_behind(tmp_path: Path) -> None:
    def broken(path: Path) -> None:
        path.write_text("half")
        raise KeyError("bug")

    with pytest.raises(KeyError):
        storage.write_folder(tmp_path / "x", {"file": broken})
    assert list(tmp_path.iterdir()) == []


def test_file_is_replaced_or_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "run.json"
    storage.write_file(target, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: fail())
        with pytest.raises(SaveError, match=r"run\.json: Input/output error; 3 bytes needed"):
            storage.write_file(target, b"new")
    assert content(tmp_path) == {"run.json": b"old"}
    storage.write_file(target, b"new")
    assert content(tmp_path) == {"run.json": b"new"}
