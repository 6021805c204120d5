"""Merges that are killed, run out of disk or meet a bad shard: no output, and nothing that a program would load."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from peftctl import merging
from peftctl.formats import shards
from tests.faults.conftest import Answer, Seen
from tests.faults.processes import in_child
from tests.faults.test_fault_signals import command, during
from tests.test_merge import saved

Call = Callable[..., Answer]


@pytest.fixture
def base(trained: Path, tmp_path: Path) -> Path:
    """The run's base in several shards."""
    from transformers import AutoModelForCausalLM

    folder = saved(AutoModelForCausalLM.from_pretrained(trained / "base"), tmp_path / "base", "100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(trained / "base" / name, folder / name)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def _cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _gone(path: Path) -> None:
    path.unlink()


def _no_header(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


def _of_another_shape(path: Path) -> None:
    save_file({name: tensor[:1].clone() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def _a_page_of_html(path: Path) -> None:
    path.write_text("<html>404</html>")


@pytest.mark.fault(20)
@pytest.mark.parametrize("spoil", [_cut_off, _empty, _gone, _no_header, _of_another_shape, _a_page_of_html])
@pytest.mark.parametrize("which", [0, 1, -1])
def test_one_bad_shard_among_several_leaves_no_output(
    spoil: Callable[[Path], None], which: int, trained: Path, base: Path, tmp_path: Path, call: Call, seen: Seen
) -> None:
    folded = next(s.path for s in shards.shards(base) if any("q_proj" in entry.name for entry in s.entries))
    path = sorted(base.glob("*.safetensors"))[which] if spoil is not _of_another_shape else folded
    spoil(path)
    answer = call("--quiet", "merge", trained / "adapter", "--base", base, "--output", tmp_path / "merged")
    lines = [line for line in answer.err.splitlines() if "was trained on" not in line]  # which is a notice
    assert answer.code in (1, 2) and len(lines) == 1 and lines[0].startswith("peftctl: error: "), lines
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    seen(lines[0].removeprefix("peftctl: error: "))


def loadable(folder: Path) -> bool:
    from transformers import AutoModelForCausalLM

    try:
        AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return False
    return True


@pytest.mark.fault(20)
def test_killed_after_any_shard_nothing_can_be_loaded(trained: Path, base: Path, tmp_path: Path, seen: Seen) -> None:
    written, folder = len(shards.shards(base)), tmp_path / "out"
    for at in range(1, written + 1):

        def work(at: int = at) -> None:
            during(merging.streaming, "_shard", at, lambda: os.kill(os.getpid(), signal.SIGKILL))
            command("merge", trained / "adapter", "--base", base, "--output", folder / "merged")

        assert in_child(work) == -signal.SIGKILL
        assert not (folder / "merged").exists()
        assert not [path for path in folder.iterdir() if loadable(path)]
    assert in_child(lambda: command("merge", trained / "adapter", "--base", base, "--output", folder / "merged")) == 0
    assert [path.name for path in folder.iterdir()] == ["merged"] and loadable(folder / "merged")
    seen(f"killed at each of {written} shards: nothing that loads, and the next call clears up")


@pytest.mark.fault(16, 20)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_merge_that_cannot_write_says_so_and_leaves_nothing(
    number: int, trained: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call, seen: Seen
) -> None:
    whole, calls = merging.streaming._copy, 0

    def copy(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise OSError(number, os.strerror(number))
        whole(*args)

    monkeypatch.setattr(merging.streaming, "_copy", copy)
    answer = call("--quiet", "merge", trained / "adapter", "--base", base, "--output", tmp_path / "merged")
    assert answer.code == 1 and os.strerror(number) in answer.err and len(answer.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    seen(answer.err.strip().removeprefix("peftctl: error: "))


@pytest.mark.fault(20)
def test_a_merge_that_answers_wrongly_is_taken_back(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call, seen: Seen
) -> None:
    copy = merging.streaming._copy

    def spoilt(source: Any, out: Any, entry: Any) -> None:
        copy(source, out, entry)
        if entry.name == "model.embed_tokens.weight":
            out.seek(entry.start - entry.end, os.SEEK_CUR)
            out.write(bytes(entry.end - entry.start))

    monkeypatch.setattr(merging.streaming, "_copy", spoilt)
    answer = call("--quiet", "merge", trained, "--output", tmp_path / "merged")
    assert answer.code == 1 and "does not answer as base and adapter do" in answer.err
    assert not list(tmp_path.iterdir())
    seen(answer.err.strip().removeprefix("peftctl: error: "))
