"""States on disk: what was written comes back, and whatever a crash leaves behind is missing, not wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from peftctl.states import RECORD, STATES, Store

PARTS = [b"one" * 4, b"two" * 8, b"three", b"four" * 2]
SIZES = [len(part) for part in PARTS]


def made(folder: Path) -> Store:
    return Store(folder, SIZES, "U8", [sum(SIZES)])


def filled(folder: Path) -> Store:
    store = made(folder)
    for number, part in enumerate(PARTS):
        store.write(number, part)
    return store


def test_what_was_written_comes_back_in_whatever_order(tmp_path: Path) -> None:
    store = made(tmp_path / "there")
    assert store.missing() == [0, 1, 2, 3]
    for number in (2, 0):
        store.write(number, PARTS[number])
    assert store.missing() == made(tmp_path / "there").missing() == [1, 3]  # 3 not begun, 1 a gap
    for number in (3, 1):
        store.write(number, PARTS[number])
    assert not store.missing()
    assert bytes(store.mapped()) == store.head + b"".join(PARTS)


def test_others_can_read_it(tmp_path: Path) -> None:
    store = Store(filled(tmp_path).folder, SIZES, "F32", [sum(SIZES) // 4])
    assert len(store.missing()) == len(PARTS), "the same bytes are other numbers"
    with safe_open(filled(tmp_path).folder / STATES, "pt") as file:
        assert list(file.keys()) == ["states"]
        assert bytes(file.get_tensor("states").tolist()) == b"".join(PARTS)


@pytest.mark.parametrize("name", [STATES, "index"])
def test_a_torn_file_lacks_what_was_torn_off(name: str, tmp_path: Path) -> None:
    whole = (filled(tmp_path).folder / name).read_bytes()
    ends = made(tmp_path).starts[1:] if name == STATES else [RECORD.size * (n + 1) for n in range(4)]
    for length in range(len(whole)):
        filled(tmp_path)
        (tmp_path / name).write_bytes(whole[:length])
        store = made(tmp_path)
        assert store.missing() == [part for part, end in enumerate(ends) if end > length]
        for part in store.missing():
            store.write(part, PARTS[part])
        assert not store.missing()
        assert bytes(store.mapped()) == store.head + b"".join(PARTS)


@given(st.sampled_from([STATES, "index"]), st.data())
def test_a_damaged_byte_is_noticed(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    folder = filled(tmp_path_factory.mktemp("damaged")).folder
    content = bytearray((folder / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(content)
    store = made(folder)
    told = name == STATES and place < len(store.head)  # what the numbers are, which holds for all parts
    assert len(store.missing()) == (len(PARTS) if told else 1)


def test_what_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        made(tmp_path / "file").write(0, PARTS[0])
    with pytest.raises(OSError):
        made(tmp_path / "nothing").mapped()
