"""Headers that are believed only when they add up, shard names that stay in their folder, and the fingerprint."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from peftctl.errors import FormatError, ModelError, PeftctlError
from peftctl.formats.shards import INDEX, SINGLE, fingerprint, header, read, shards
from tests.models import tiny


def stored(folder: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors or {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4).half()}, folder / SINGLE)
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 3}')
    return folder


def raw(path: Path, document: Any, data: bytes) -> Path:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_a_header_is_read_and_written_alike(tmp_path: Path) -> None:
    stored(tmp_path)
    shard = read(tmp_path / SINGLE)
    assert {e.name: (e.dtype, e.shape) for e in shard.entries} == {"a": ("F32", (2, 3)), "b": ("F16", (4,))}
    (tmp_path / "again").write_bytes(header(list(shard.entries), {"format": "pt"}) + bytes(shard.entries[-1].end))
    assert read(tmp_path / "again").entries == shard.entries
    assert read(tmp_path / "again").metadata == {"format": "pt"}


@pytest.mark.parametrize(
    ("document", "data"),
    [
        ({"a": entry("F32", [2], 0, 8)}, b"\0" * 7),
        ({"a": entry("F32", [2], 0, 8)}, b"\0" * 9),
        ({"a": entry("F32", [3], 0, 8)}, b"\0" * 8),
        ({"a": entry("F32", [2], 4, 12)}, b"\0" * 12),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, b"\0" * 12),
        ({"a": entry("F32", [-2], 0, -8)}, b""),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
        ({"a": 3}, b""),
        ([], b""),
        (b"not json", b""),
        (b"[" * 100_000, b""),
    ],
)
@pytest.mark.fault(22)
def test_a_file_that_lies_about_itself_is_refused_by_name(document: Any, data: bytes, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=SINGLE.replace(".", r"\.")):
        read(raw(tmp_path / SINGLE, document, data))


@given(st.binary(max_size=64))
def test_no_bytes_at_all_are_more_than_an_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / SINGLE
    path.write_bytes(data)
    try:
        read(path)
    except PeftctlError:
        return
    assert len(data) >= 8  # `{}` after its length is an empty file


@pytest.mark.fault(22)
def test_a_length_beyond_the_file_is_not_allocated(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(FormatError, match="not a whole safetensors file"):
        read(tmp_path / SINGLE)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", 3])
@pytest.mark.fault(32)
def test_an_index_cannot_lead_out_of_its_folder(name: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    stored(tmp_path)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FormatError, match="leads out"):
        shards(folder)


def test_a_missing_shard_is_named_and_a_broken_index_told(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    with pytest.raises(ModelError, match=r"model-2\.safetensors"):
        shards(tmp_path)
    (tmp_path / INDEX).write_text("[]")
    with pytest.raises(FormatError, match="weight_map"):
        shards(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(ModelError, match="saved as safetensors"):
        shards(tmp_path)


def test_the_fingerprint_tells_models_apart_and_survives_saving_again(tmp_path: Path) -> None:
    model = tiny("llama")
    for name, size in [("one", "1GB"), ("many", "20KB")]:
        model.save_pretrained(tmp_path / name, max_shard_size=size)
    again = tmp_path / "many" / "config.json"
    again.write_text(json.dumps(json.loads(again.read_text()) | {"transformers_version": "0"}))
    tiny("qwen3").save_pretrained(tmp_path / "other")
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "many")
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "other")


def test_a_tensor_of_another_shape_type_or_content_changes_the_fingerprint(tmp_path: Path) -> None:
    first = fingerprint(stored(tmp_path, a=torch.zeros(200, 30)))
    assert fingerprint(stored(tmp_path, a=torch.zeros(200, 30))) == first
    assert fingerprint(stored(tmp_path, a=torch.zeros(30, 200))) != first
    assert fingerprint(stored(tmp_path, a=torch.zeros(200, 30, dtype=torch.int32))) != first
    for row in (0, 100, 199):
        changed = torch.zeros(200, 30)
        changed[row] = 1
        assert fingerprint(stored(tmp_path, a=changed)) != first
