"""Each kind of broken file gives its line and a reason; sound ones are read whole."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftctl.data.sources import read
from peftctl.errors import DataError


def write(tmp_path, content: bytes | str, name: str = "rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "invalid JSON: Expecting ',' delimiter (column 8)"),
        (b"[1]", "not a JSON object but a list"),
        (b'"x"', "not a JSON object but a text"),
        (b"null", "not a JSON object but null"),
        (b'{"a": "\xff"}', "invalid UTF-8 at byte 8 of the line"),
        (b'{"a": NaN}', "invalid JSON: NaN is not a JSON value"),
        (b'{"a": 1, "a": 2}', "invalid JSON: the key 'a' stands twice in one object"),
        (b'{"a": "\x00"}', "invalid JSON: Invalid control character at (column 8)"),
        (b'{"a":' + b"[" * 200_000, "invalid JSON: nested too deep"),
        (b'{"a": 1} {"b": 2}', "invalid JSON: Extra data (column 10)"),
    ],
)
@pytest.mark.fault(36)
def test_a_bad_line_is_a_fault_with_its_place(tmp_path, monkeypatch, line, reason):
    monkeypatch.chdir(tmp_path)
    source = read(write(tmp_path, b'{"a": 1}\n\n' + line + b'\n{"b": 2}\n'))
    assert [str(fault) for fault in source.faults] == [f"rows.jsonl:3: {reason}"]
    assert source.rows == [("rows.jsonl:1", {"a": 1}), ("rows.jsonl:4", {"b": 2})]


@pytest.mark.fault(36)
def test_bom_windows_line_ends_and_blank_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = b'\xef\xbb\xbf{"a": "x"}\r\n\r\n   \n{"a": "\xe2\x80\xa8"}'
    source = read(write(tmp_path, content))
    assert source.rows == [("rows.jsonl:1", {"a": "x"}), ("rows.jsonl:4", {"a": "\u2028"})]
    assert source.fingerprint == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("content", ["", "\n \r\n", "\ufeff"])
@pytest.mark.fault(36)
def test_an_empty_file_is_refused(tmp_path, content):
    with pytest.raises(DataError, match="the file is empty"):
        read(write(tmp_path, content))


def test_missing_or_of_another_kind(tmp_path):
    write(tmp_path, "{}", "train.jsonl")
    with pytest.raises(DataError, match=r"tran\.jsonl does not exist; did you mean train\.jsonl\?"):
        read(tmp_path / "tran.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"\.csv is not read; \.jsonl and \.json are"):
        read(write(tmp_path, "a,b", "rows.csv"))


def test_a_json_list_has_places_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = read(write(tmp_path, '\ufeff [\n {"a": 1},\n\n {"a":\n 2}, 3\n]\n', "rows.json"))
    assert source.rows == [("rows.json:2", {"a": 1}), ("rows.json:4", {"a": 2})]
    assert [str(fault) for fault in source.faults] == ["rows.json:5: not a JSON object but a number"]
    assert read(write(tmp_path, '{"a": 1}\n{"a": 2}', "lines.json")).rows[1] == ("lines.json:2", {"a": 2})


@pytest.mark.parametrize("content", ['[{"a": 1},\n {"a"', '[{"a": 1}\n {"a": 2}]', '[{"a": 1}\n] x', '[{"a": 1},\n'])
@pytest.mark.fault(36)
def test_a_json_list_that_breaks_off_is_refused(tmp_path, content):
    with pytest.raises(DataError, match=r"rows\.json"):
        read(write(tmp_path, content, "rows.json"))
    with pytest.raises(DataError, match=r"invalid UTF-8 at byte 8"):
        read(write(tmp_path, b'[{"a":"\xff"}]', "rows.json"))


def test_limit_counts_rows(tmp_path):
    assert len(read(write(tmp_path, '{"a":1}\n\n{"a":2}\n{"a":3}'), limit=2).rows) == 2


@given(st.binary(max_size=80))
def test_no_bytes_are_a_crash(tmp_path_factory, content):
    for suffix in (".jsonl", ".json"):
        path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
        path.write_bytes(content)
        try:
            source = read(path)
        except DataError:
            continue
        assert source.rows or source.faults
