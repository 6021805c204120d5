"""A merge's files: bytes copied by the kernel or without it, folds in blocks of rows, tokenizers of every kind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftctl import folding, merging, methods
from peftctl.base import resolve
from peftctl.errors import InputError
from peftctl.formats import copying, peft, vocabularies
from peftctl.formats.shards import Entry
from peftctl.merge import Changes, _runs
from peftctl.merge import merge as merge_files
from peftctl.surgery import skeleton
from tests.methods import contract
from tests.models import tiny
from tests.runs import CONFIGS
from tests.test_merge import empty, saved, tensors, trained

CONTENT = bytes(range(256)) * 40


def unserved(number: int) -> Callable[..., int]:
    def refuse(*arguments: Any) -> int:
        raise OSError(number, os.strerror(number))

    return refuse


def partly(step: Callable[..., int]) -> Callable[..., int]:
    """The kernel's copy, which serves three bytes and then no more."""
    calls = iter([3])

    def once(*arguments: Any) -> int:
        size = next(calls, None)
        if size is None:
            raise OSError(errno.EINVAL, "no more")
        return step(*arguments[:-1], size)

    return once


@pytest.mark.parametrize("way", ["kernel", "sendfile", "neither", "partly"])
@pytest.mark.parametrize(("start", "size"), [(0, len(CONTENT)), (17, 5000), (3, 0), (len(CONTENT) - 5, 50)])
def test_a_range_is_appended_whichever_way_it_goes(
    way: str, start: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "partly":
        monkeypatch.setattr(copying, "_range", partly(copying._range))
    elif way != "kernel":
        monkeypatch.setattr(copying, "_range", unserved(errno.EXDEV))
    if way == "neither":
        monkeypatch.setattr(copying, "_sent", unserved(errno.ENOSYS))
    (tmp_path / "source").write_bytes(CONTENT)
    with (tmp_path / "source").open("rb") as source, (tmp_path / "out").open("wb") as out:
        out.write(b"head")
        assert copying.copy_range(source, out, start, size) == len(CONTENT[start : start + size])
        out.write(b"tail")
    assert (tmp_path / "out").read_bytes() == b"head" + CONTENT[start : start + size] + b"tail"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_fault_of_the_disk_is_none_of_the_way(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_range", unserved(number))
    (tmp_path / "source").write_bytes(CONTENT)
    with (tmp_path / "source").open("rb") as source, (tmp_path / "out").open("wb") as out:
        with pytest.raises(OSError, match=os.strerror(number)):
            copying.copy_range(source, out, 0, 10)


def test_untouched_neighbours_are_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved(tiny("llama"), tmp_path / "base", "1GB")
    sizes, whole = [], copying.copy_range

    def watched(source: Any, out: Any, start: int, size: int) -> int:
        sizes.append(size)
        return whole(source, out, start, size)

    monkeypatch.setattr("peftctl.merge.copy_range", watched)
    attachment = trained(tiny("llama"), "lora", rank=2, target_modules=["q_proj"])
    merge_files(base, empty(base), attachment, tmp_path / "merged")
    changed = {
        name for name, value in tensors(base).items() if not torch.equal(value, tensors(tmp_path / "merged")[name])
    }
    assert len(changed) == 2 and len(sizes) <= 3
    assert sum(sizes) == sum(value.nbytes for name, value in tensors(base).items() if name not in changed)


def test_neighbours_of_what_is_left_out_are_two_copies() -> None:
    """A head for other labels lies between tensors that stay, and is not written."""
    old = [Entry(name, "F32", (2,), at, at + 8) for name, at in (("a", 0), ("b", 8), ("d", 24), ("e", 32))]
    laid = [(one, one._replace(start=8 * place, end=8 * place + 8)) for place, one in enumerate(old)]
    runs = [[one.name for one, _ in run] for run in _runs(laid, Changes({}, {}))]
    assert runs == [["a", "b"], ["d", "e"]]


@given(st.lists(st.integers(0, 5), max_size=3), st.integers(1, 12))
def test_blocks_of_rows_are_the_whole_tensor_once(shape: list[int], size: int) -> None:
    entry = Entry("a", "BF16", tuple(shape), 6, 6 + 2 * int(torch.tensor(shape).prod() if shape else 1))
    at, rows = entry.start, 0
    for first, part in folding.blocks(entry, size):
        assert (first, part.start, part.dtype) == (rows, at, "BF16")
        assert part.end - part.start == 2 * int(torch.tensor(part.shape).prod() if shape else 1)
        at, rows = part.end, rows + (part.shape[0] if shape else 1)
    assert at == entry.end and rows == (shape[0] if shape else 1)


@pytest.mark.parametrize("method", ["lora", "vera", "adalora", "dora", "full", "ia3"])
def test_a_fold_in_blocks_is_the_fold_of_the_whole(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a change can be made row by row; the others still go as a whole."""
    base = saved(tiny("llama"), tmp_path / "base")
    attachment = trained(tiny("llama"), method)
    merge_files(base, empty(base), attachment, tmp_path / "whole")
    whole, sizes = folding.rounded, []

    def watched(weight: torch.Tensor, entry: Entry) -> torch.Tensor:
        sizes.append(weight.numel())
        return whole(weight, entry)

    monkeypatch.setattr(folding, "rounded", watched)
    monkeypatch.setattr(folding.blocks, "__defaults__", (100,))
    merge_files(base, empty(base), attachment, tmp_path / "parted")
    assert (max(sizes) <= 100) == (method in ("lora", "vera", "adalora"))
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "parted")
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6)
    assert any(not torch.equal(value, one[name]) for name, value in tensors(base).items())


def test_blocks_of_a_product_say_their_rows() -> None:
    _, attachment = contract.attached(contract.config("lora", rank=3, target_modules=["q_proj"]), "llama")
    contract.disturb(attachment)
    delta: Any = attachment.deltas[0]
    weight = torch.randn(delta.module.shapes["weight"])
    whole = delta.fold("weight", weight)
    parts = [delta.fold_rows("weight", weight[first : first + 5], first) for first in range(0, len(weight), 5)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)


# what folders of older and newer kinds have; any content will do, as none is read
KINDS = {
    "fast": ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"],
    "sentencepiece": ["tokenizer.model", "tokenizer_config.json"],
    "t5": ["spiece.model", "special_tokens_map.json"],
    "bpe": ["vocab.json", "merges.txt"],
    "wordpiece": ["vocab.txt"],
    "marian": ["source.spm", "target.spm", "vocab.json"],
    "tiktoken": ["qwen.tiktoken", "chat_template.jinja", "additional_chat_templates/tool.jinja"],
    "none": [],
}


def fill(folder: Path, names: list[str], content: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{content} {name}")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny("gpt2").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path) -> Path:
    config, folder = contract.config("lora"), base.with_name("adapter")
    model, attachment = contract.attached(config, "gpt2")
    contract.disturb(attachment)
    folder.mkdir()
    peft.write(folder, methods.get("lora"), config, skeleton(model), attachment.tensors(), resolve(str(base)))
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [False, True])
def test_a_tokenizer_of_any_kind_is_passed_on_as_it_is(
    kind: str, own: bool, base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(base, KINDS[kind], "the base's")
    if own:
        fill(adapter, KINDS[kind], "the adapter's")
    merging.merge([str(adapter)], tmp_path / "merged")
    for name in KINDS[kind]:
        whose = "the adapter's" if own else "the base's"
        assert (tmp_path / "merged" / name).read_text() == f"{whose} {name}"
    assert ("has no tokenizer" in capsys.readouterr().err) == (kind == "none")


def test_a_template_in_the_adapters_own_config_is_not_hidden_by_the_bases_file(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    shutil.copytree(CONFIGS / "tokenizer", base, dirs_exist_ok=True)
    assert (base / vocabularies.TEMPLATE).is_file()
    shutil.copyfile(CONFIGS / "tokenizer" / "tokenizer.json", adapter / "tokenizer.json")
    (adapter / vocabularies.CONFIG).write_text(json.dumps({"chat_template": "{{ 1 }}"}))
    merging.merge([str(adapter)], tmp_path / "merged", verify=False)
    assert json.loads((tmp_path / "merged" / vocabularies.CONFIG).read_text()) == {"chat_template": "{{ 1 }}"}
    assert not (tmp_path / "merged" / vocabularies.TEMPLATE).exists()


@pytest.mark.parametrize(("output", "dtype"), [("base", None), ("new", "int8")])
def test_what_the_command_line_shows_to_be_wrong_is_refused_first(
    output: str, dtype: str | None, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "file").touch()
    with pytest.raises(InputError, match=r"exists already|--dtype: 'int8'"):
        merging.merge(["no adapter at all"], tmp_path / output, dtype=dtype)
