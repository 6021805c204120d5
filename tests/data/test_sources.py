"""Each kind of broken file gives its line and a reason; sound ones are read whole."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import tracemalloc

import pytest
from hypothesis import given, settings
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
    with pytest.raises(DataError, match=r"\.xlsx is not read; \.jsonl, .* are"):
        read(write(tmp_path, "a,b", "rows.xlsx"))
    with pytest.raises(DataError, match=r"\.gz is not read"):
        read(write(tmp_path, "a,b", "rows.gz"))


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


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=80))
@pytest.mark.fault(36)
def test_no_bytes_are_a_crash(tmp_path_factory, content):
    for suffix in (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet"):
        for packed in (content, gzip.compress(content, 1), gzip.compress(content, 1)[:-9]):
            path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}{'' if packed is content else '.gz'}"
            path.write_bytes(packed)
            try:
                source = read(path)
            except DataError:
                continue
            assert source.rows or source.faults


@pytest.mark.fault(36)
def test_a_line_of_100_mb_is_a_fault_and_is_never_held(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": 1}\n')
        file.truncate(100 << 20)  # NUL characters, of which no disk block is written
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"a": 2}\n')
    tracemalloc.start()
    source = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row for _, row in source.rows] == [{"a": 1}, {"a": 2}] and source.rows[1][0].endswith(":3")
    assert "longer than 16 MiB" in source.faults[0].reason and peak < 40 << 20


@pytest.mark.fault(36)
def test_utf_16_is_named(tmp_path):
    for suffix in ("jsonl", "csv", "txt"):
        with pytest.raises(DataError, match="is UTF-16"):
            read(write(tmp_path, '{"a": 1}'.encode("utf-16"), f"rows.{suffix}"))


@pytest.mark.parametrize("keep", [12, 200, -9, -4])
@pytest.mark.fault(36)
def test_a_gzip_file_that_breaks_off_has_its_place(tmp_path, monkeypatch, keep):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"a": random.Random(number).random()}) for number in range(40)]
    whole = gzip.compress("\n".join(lines).encode())
    source = read(write(tmp_path, whole[:keep], "rows.jsonl.gz"))
    assert [row for _, row in source.rows] == [json.loads(line) for line in lines[: len(source.rows)]]
    assert "breaks off" in source.faults[-1].reason
    assert source.faults[-1].place == f"rows.jsonl.gz:{len(source.rows) + len(source.faults)}"


def test_lines_of_text_are_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = read(write(tmp_path, b"\xef\xbb\xbffirst \xe2\x80\xa8 line\r\n\n  second\nb\xffd\nn\x00l", "rows.txt"))
    assert source.rows == [("rows.txt:1", {"text": "first \u2028 line"}), ("rows.txt:3", {"text": "  second"})]
    reasons = ["invalid UTF-8 at byte 2 of the line", "a NUL character at byte 2 of the line"]
    assert [str(fault) for fault in source.faults] == [f"rows.txt:{4 + n}: {why}" for n, why in enumerate(reasons)]


def test_a_folder_and_a_pattern_are_read_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = tmp_path / "parts"
    (parts / "deep").mkdir(parents=True)
    write(parts, '{"a": 2}', "b.jsonl")
    write(parts, "a\n1\n", "a.csv")
    write(parts, "not data", "README.md")
    write(parts, '{"a": 9}', ".hidden.jsonl")
    write(parts / "deep", '{"a": 3}', "c.jsonl")
    assert read("parts").rows == [("parts/a.csv:2", {"a": "1"}), ("parts/b.jsonl:1", {"a": 2})]
    assert [row["a"] for _, row in read("parts/**/*.jsonl").rows] == [2, 3]
    assert read("parts").fingerprint != read("parts/*.jsonl").fingerprint == read("parts/b.jsonl").fingerprint
    assert len(read("parts", limit=1).rows) == 1
    write(tmp_path, '{"a": 4}', "odd[1].jsonl")
    assert read("odd[1].jsonl").rows[0][1] == {"a": 4}  # a file that is there is no pattern
    with pytest.raises(DataError, match="holds no data file"):
        read(_empty(tmp_path))
    with pytest.raises(DataError, match="none that fits the pattern"):
        read("parts/*.parquet")
    with pytest.raises(DataError, match=r"README.md: \.md is not read"):
        read("parts/*")


def _empty(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"
