"""What a disk can do to a run: end in the middle of a save, be full, read-only, or fail to keep its word."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from peftctl import checkpoint, run
from peftctl import model as models
from peftctl.errors import InputError, SaveError
from peftctl.plan import Options
from tests import runs
from tests.faults.conftest import Seen
from tests.faults.processes import in_child

EVERY_STEP = runs.document(train={"save_every": 1, "keep": 2})
POINTS = ("replace", "fsync")  # of os, at which a save touches the disk for good


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    output = tmp_path_factory.mktemp("whole") / "run"
    runs.train(output, EVERY_STEP)
    return output


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **more: object) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(models, "load", load)


def counted(patch: pytest.MonkeyPatch, act: Callable[[int, Any], None]) -> None:
    """`act` on the number of each call that touches the disk, and on what it is called with, before it."""
    calls = 0

    def wrap(name: str) -> None:
        original = getattr(os, name)

        def wrapped(first: Any, *rest: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            act(calls, first)
            return original(first, *rest, **more)

        patch.setattr(os, name, wrapped)

    for name in POINTS:
        wrap(name)


def calls_of_a_run(output: Path) -> int:
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        counted(patch, lambda number, _: seen.append(number))
        runs.train(output, EVERY_STEP)
    return seen[-1]


def assert_equal(one: Path, other: Path) -> None:
    assert runs.untimed(one) == runs.untimed(other)
    assert runs.bits(one) == runs.bits(other)
    assert not [path for path in other.rglob(".*") if path.name.startswith((".tmp-", ".old-"))]


@pytest.mark.fault(11)
def test_killed_anywhere_in_a_run_equals_never_killed(whole: Path, tmp_path: Path, seen: Seen) -> None:
    last = calls_of_a_run(tmp_path / "counted")
    points = range(last // 6, last, last // 6)
    for at in points:
        output = tmp_path / str(at)

        def die(number: int, _: Any, at: int = at) -> None:
            if number == at:
                os.kill(os.getpid(), signal.SIGKILL)

        def work(output: Path = output, die: Callable[[int, Any], None] = die) -> None:
            with pytest.MonkeyPatch.context() as patch:
                counted(patch, die)
                runs.train(output, EVERY_STEP)

        assert in_child(work) == -signal.SIGKILL
        runs.train(output, EVERY_STEP, resume=(output / "run.json").exists())
        assert_equal(whole, output)
    seen(f"killed at {len(points)} of a run's {last} renames and syncs, resumed: equal bits")


@pytest.mark.fault(16, 19)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_save_that_fails_is_none_and_the_run_goes_on_later(
    number: int, whole: Path, tmp_path: Path, seen: Seen
) -> None:
    output = tmp_path / "run"

    def fail(_: int, what: Any) -> None:
        if isinstance(what, int) and "step-000003" in os.readlink(f"/proc/self/fd/{what}"):
            raise OSError(number, os.strerror(number))

    with pytest.MonkeyPatch.context() as patch:
        counted(patch, fail)
        with pytest.raises(SaveError, match=r"step-000003: .*; [\d,]+ bytes needed, [\d,]+ free at") as caught:
            runs.train(output, EVERY_STEP)
    assert caught.value.exit_code == 1
    assert {path.name for path in (output / "checkpoints").iterdir()} == {"step-000001", "step-000002"}
    assert not (output / "lock").exists()
    runs.train(output, EVERY_STEP, resume=True)
    assert_equal(whole, output)
    seen(caught)


@pytest.mark.fault(19)
def test_a_log_that_does_not_reach_the_disk_stops_the_run(tmp_path: Path) -> None:
    def fail(_: int, what: Any) -> None:
        if isinstance(what, int) and os.readlink(f"/proc/self/fd/{what}").endswith("metrics.jsonl"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.MonkeyPatch.context() as patch:
        counted(patch, fail)
        with pytest.raises(SaveError, match=r"metrics\.jsonl: Input/output error"):
            runs.train(tmp_path / "run", EVERY_STEP)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*")), "a checkpoint whose steps the log lacks"


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))


@pytest.mark.fault(16)
@pytest.mark.usefixtures("unloaded")
def test_a_disk_without_room_for_a_checkpoint_is_told_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 5000)
    with pytest.raises(
        InputError, match=r"output: a checkpoint and the adapter need some 32,768 bytes, 5,000 are free"
    ):
        runs.train(tmp_path / "run", EVERY_STEP)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.fault(16)
def test_a_disk_without_room_for_all_checkpoints_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Path
) -> None:
    one = sum(path.stat().st_size for path in (trained / "checkpoints" / "step-000004").iterdir())
    assert 3 * 8192 < one < 3 * 8192 + 20_000, "three times the adapter's 8,192 bytes, headers and generators"
    stored = runs.document(model={"name": str(trained / "base")}, train={"save_every": 1, "keep": 2})
    for free, told in ((81_920, False), (81_919, True)):
        recipe = runs.loaded(tmp_path / str(free), stored)
        with_free(monkeypatch, free)
        run.train(recipe, Options(verify=False))
        assert ("the checkpoints may need some 81,920 bytes, 81,919 are free" in capsys.readouterr().err) == told


@pytest.mark.fault(17)
def test_no_temporary_folder_is_needed(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("TMPDIR", "/dev/full")
    for name in ("mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory"):
        monkeypatch.setattr(tempfile, name, full)
    runs.train(tmp_path / "run", EVERY_STEP, verify=True)
    assert_equal(whole, tmp_path / "run")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of a size, or gives a mounted one another, where this user may."""
    place = tmp_path / "disk"
    place.mkdir()

    def mounted(size: str) -> Path:
        options = f"remount,size={size}" if os.path.ismount(place) else f"size={size}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("this user may not mount a disk")
        return place

    yield mounted
    subprocess.run(["umount", place], capture_output=True, check=False)


@pytest.mark.fault(16)
@pytest.mark.skipif(not shutil.which("mount"), reason="there is no mount command")
def test_a_disk_that_fills_up_keeps_what_was_saved_and_the_run_goes_on_with_more(
    small: Callable[[str], Path], trained: Path, tmp_path: Path, seen: Seen
) -> None:
    stored = runs.document(model={"name": str(trained / "base")}, train={"save_every": 1, "keep": 9})
    runs.train(tmp_path / "whole", stored)
    output = small("150k") / "run"
    # the fault hits in the middle of the disk's last file
    with pytest.raises(
        SaveError, match=r"step-00000\d: .*No space left on device.*; [\d,]+ bytes needed, [\d,]+ free at"
    ) as e:
        runs.train(output, stored)
    assert not [path for path in output.rglob("*") if path.name.startswith(".tmp-")]
    held = [checkpoint.verify(path) for path in (output / "checkpoints").iterdir()]
    assert 0 < len(held) < 4 and runs.done(output) > 0
    small("20m")
    runs.train(output, stored, resume=True)
    assert_equal(tmp_path / "whole", output)
    seen(e)


@pytest.mark.fault(17)
@pytest.mark.skipif(not shutil.which("mount"), reason="there is no mount command")
def test_a_full_temporary_disk_is_none_of_a_runs_business(
    small: Callable[[str], Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small("64k")
    with (disk / "full").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    monkeypatch.setenv("TMPDIR", str(disk))
    monkeypatch.setattr(tempfile, "tempdir", None)
    runs.train(tmp_path / "run", EVERY_STEP, verify=True)
    assert_equal(whole, tmp_path / "run")


@pytest.mark.fault(32)
def test_a_checkpoint_that_leads_elsewhere_is_not_followed_when_it_goes(trained: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(trained, tmp_path / "run"))
    first, elsewhere = output / "checkpoints" / "step-000001", tmp_path / "elsewhere"
    first.rename(elsewhere)
    first.symlink_to(elsewhere)
    before = {path.name: path.read_bytes() for path in elsewhere.iterdir()}
    checkpoint.rotate(output, keep=1)
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == before
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-000004"]


def _a_file(folder: Path) -> Path:
    (folder / "run").write_text("mine")
    return folder / "run"


def _below_a_file(folder: Path) -> Path:
    return _a_file(folder) / "deeper" / "run"


def _with_a_nul(folder: Path) -> Path:
    return folder / "run\0"


@pytest.mark.fault(18)
@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("place", [_a_file, _below_a_file, _with_a_nul])
def test_an_output_that_cannot_be_a_folder(
    place: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Seen
) -> None:
    output = place(tmp_path)
    recipe = runs.loaded(tmp_path / "other", EVERY_STEP).model_copy(update={"output": str(output)})
    monkeypatch.setattr(run, "plan", lambda *_: pytest.fail("the data was read first"))
    monkeypatch.setattr(time, "sleep", lambda *_: pytest.fail("it is tried again"))
    with pytest.raises(InputError, match=r"output: .*cannot be made") as caught:
        run.train(recipe, Options(quiet=True))
    assert "\n" not in str(caught.value)
    seen(caught)


@pytest.mark.fault(18)
@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.skipif(not shutil.which("mount"), reason="there is no mount command")
def test_an_output_on_a_read_only_disk_is_told_before_data_and_model(
    exists: bool, small: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Seen
) -> None:
    disk = small("1m")
    output = disk / "deep" / "run"
    if exists:
        output.mkdir(parents=True)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    recipe = runs.loaded(tmp_path / "other", EVERY_STEP).model_copy(update={"output": str(output)})
    monkeypatch.setattr(run, "plan", lambda *_: pytest.fail("the data was read first"))
    monkeypatch.setattr(time, "sleep", lambda *_: pytest.fail("it is tried again"))
    with pytest.raises(InputError, match=r"output: .*run' cannot be written: .* is read-only") as caught:
        run.train(recipe, Options(quiet=True))
    seen(caught)


@pytest.mark.fault(7, 18)
@pytest.mark.skipif(not shutil.which("mount"), reason="there is no mount command")
def test_a_finished_run_on_a_read_only_disk_still_tells_its_result(
    small: Callable[[str], Path], trained: Path, tmp_path: Path
) -> None:
    stored = runs.document(model={"name": str(trained / "base")}, train={"max_steps": 1})
    loaded = runs.loaded(tmp_path / "other", stored)
    disk = small("4m")
    loaded = loaded.model_copy(update={"output": str(disk / "run")})
    before = run.train(loaded, Options(quiet=True, verify=False))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert run.train(loaded, Options(quiet=True, resume=True)) == before


@pytest.mark.fault(18)
@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("exists", [True, False])
def test_an_output_that_is_read_only(exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By injection: who runs the tests may be allowed everything."""
    recipe, opened = runs.loaded(tmp_path / "run", EVERY_STEP), Path.open

    def refuse(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if mode in ("r", "rb"):
            return opened(path, mode, *rest, **more)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    if exists:
        (tmp_path / "run").mkdir()
        monkeypatch.setattr(Path, "open", refuse)
    else:
        monkeypatch.setattr(Path, "mkdir", lambda path, **more: refuse(path, "x"))
    with pytest.raises(InputError, match=r"output: .*run.* cannot be .*: Read-only file system"):
        run.train(recipe, Options(quiet=True))


@pytest.mark.fault(18)
def test_a_missing_parent_is_made(tmp_path: Path) -> None:
    recipe = runs.loaded(tmp_path / "other", runs.document(train={"max_steps": 1}))
    output = tmp_path / "a" / "b"
    run.train(recipe.model_copy(update={"output": str(output)}), Options(quiet=True, verify=False))
    assert checkpoint.newest(output) is not None
