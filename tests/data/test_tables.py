"""CSV, TSV and parquet: what is wrong has its row; the same rows come back from every format."""

from __future__ import annotations

import csv
import gzip
import json
from datetime import datetime
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftctl.data.formats import recognise
from peftctl.data.sources import read
from peftctl.errors import DataError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(content: bytes | str, name: str = "rows.csv"):
    with open(name, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return read(name)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"only one", "1 cells, where the header has 2"),
        (b"a,b,c", "3 cells, where the header has 2"),
        (b'"a" b,c', "invalid CSV: ',' expected after '\"'"),
        (b"a,\xff", "invalid UTF-8 in the column 'completion'"),
        (b"\x00,b", "a NUL character in the column 'prompt'"),
        (b"a\rb,c", "a bare carriage return outside quotes"),
    ],
)
@pytest.mark.fault(36)
def test_a_bad_row_is_a_fault_with_its_line(line, reason):
    source = found(b'prompt,completion\n"x\ny",1\n\n' + line + b"\nz,2\n")
    assert [str(fault) for fault in source.faults] == [f"rows.csv:5: {reason}"]
    assert [(place, row["prompt"]) for place, row in source.rows] == [("rows.csv:2", "x\ny"), ("rows.csv:6", "z")]


@pytest.mark.fault(36)
def test_an_open_quote_and_a_long_line():
    source = found('a,b\n1,2\n3,"4\n5,6')
    assert [fault.place for fault in source.faults] == ["rows.csv:3"] and "not closed" in source.faults[0].reason
    source = found(b"a,b\n1," + b"x" * (17 << 20) + b"\n3,4\n")
    assert [fault.place for fault in source.faults] == ["rows.csv:2"] and "16 MiB" in source.faults[0].reason
    assert source.rows == [("rows.csv:3", {"a": "3", "b": "4"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("a,b\n", "the file is empty"),
        ("a,b,a\n1,2,3", "rows.csv:1: the header names the column 'a' twice"),
        (b"a,\xff\n1,2", "rows.csv:1: invalid UTF-8"),
        ('"a" b,c\n', "rows.csv:1: invalid CSV.*; the first row must name the columns"),
    ],
)
@pytest.mark.fault(36)
def test_a_header_is_needed(content, message):
    with pytest.raises(DataError, match=message):
        found(content)


def test_bom_line_ends_and_blank_rows():
    source = found(b'\xef\xbb\xbfa,b\r\n"1\r\n1",\r\n,\r\n\r\n \r\n2,3')
    assert source.rows == [("rows.csv:2", {"a": "1\r\n1", "b": None}), ("rows.csv:7", {"a": "2", "b": "3"})]
    assert found("a\tb\n1,\t2\n", "rows.tsv").rows == [("rows.tsv:2", {"a": "1,", "b": "2"})]
    assert found("a\n" + "x" * 200_000).rows[0][1]["a"] == "x" * 200_000  # beyond the csv module's own limit


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_cells_spell_out_what_is_no_text():
    def only(*cells: str, columns: str, **more):
        with open("rows.csv", "w", newline="") as file:
            csv.writer(file).writerows([columns.split(), cells])
        result = recognise(read("rows.csv"), **more)
        return result.examples[0] if result.examples else str(result.faults[0])

    spelled = json.dumps(MESSAGES)
    assert [m.content for m in only(spelled, columns="messages").messages] == ["q", "a"]
    assert only("[{'role': 'user'}]", columns="messages").startswith("rows.csv:2: messages is not JSON")
    pair = only(json.dumps(MESSAGES[:1]), "yes", "no", columns="prompt chosen rejected")
    assert pair.messages[0].content == "q" and pair.chosen[0].content == "yes"
    for cell, label in {"true": True, "False": False, "1": True, "0": False}.items():
        assert only("q", "a", cell, columns="prompt completion label", wanted={"unpaired"}).label is label
    assert "label must be true" in only("q", "a", "good", columns="prompt completion label", wanted={"unpaired"})
    assert only("q", "[1, 2]", columns="prompt completion").completion == "[1, 2]"
    assert only("q", '[{"x": 1}]', columns="prompt completion").completion == '[{"x": 1}]'
    assert only("12", "013", columns="prompt completion").completion == "013"  # a number is a text here
    assert "no 'completion'" in only("q", "", columns="prompt completion")


def test_a_renamed_column_is_spelled_out_too():
    with open("rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([["talk"], [json.dumps(MESSAGES)]])
    assert recognise(read("rows.csv"), columns={"messages": "talk"}).examples[0].messages[1].content == "a"


def written(rows: list[dict], name: str) -> None:
    """The rows in the format of the name, by the writers that everybody uses."""
    columns = list(rows[0])
    if ".parquet" in name:
        pq.write_table(pa.Table.from_pylist(rows), "plain", row_group_size=3)
        with open("plain", "rb") as file:
            content = file.read()
    elif ".jsonl" in name:
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    else:
        with open("plain", "w", newline="", encoding="utf-8") as file:
            dialect = "excel-tab" if ".tsv" in name else "excel"
            cells = [[c if isinstance(c, str) else json.dumps(c) for c in row.values()] for row in rows]
            csv.writer(file, dialect).writerows([columns, *cells])
        with open("plain", "rb") as file:
            content = file.read()
    with open(name, "wb") as file:
        file.write(gzip.compress(content, 1) if name.endswith(".gz") else content)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
NAMES = [f"rows.{kind}{packed}" for kind in ("jsonl", "csv", "tsv", "parquet") for packed in ("", ".gz")]


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT, st.booleans()), min_size=1, max_size=8))
def test_the_same_rows_come_back_from_every_format(rows):
    talks = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}], "label": c}
        for a, b, c in rows
    ]
    plain = [{"prompt": a, "completion": b, "label": c} for a, b, c in rows]
    pairs = [{"prompt": a, "chosen": a + b, "rejected": b} for a, b, _ in rows]
    asked = [
        {"prompt": talk["messages"][:1], "chosen": a, "rejected": b}
        for talk, (a, b, _) in zip(talks, rows, strict=True)
    ]
    for kind, given_rows in (("unpaired", talks), ("unpaired", plain), ("preference", pairs), ("preference", asked)):
        answers = []
        for name in NAMES:
            written(given_rows, name)
            found = recognise(read(name), kind)
            answers.append(
                ([one._replace(place="") for one in found.examples], [fault.reason for fault in found.faults])
            )
        assert all(answer == answers[0] for answer in answers)
        assert len(answers[0][0]) + len(answers[0][1]) == len(rows)


def test_rows_of_parquet_have_numbers():
    written([{"a": number} for number in range(8)], "rows.parquet")
    assert read("rows.parquet").rows[4] == ("rows.parquet:row 5", {"a": 4})


def test_values_that_json_has_not_are_texts():
    moment, number = datetime(2001, 2, 3, 4), Decimal("1.50")
    row = {"a": moment, "b": {"c": [number]}, "d": b"raw", "e": None}
    pq.write_table(pa.Table.from_pylist([row, {"a": None}]), "rows.parquet")
    first, second = (found for _, found in read("rows.parquet").rows)
    assert first == {"a": "2001-02-03 04:00:00", "b": {"c": ["1.50"]}, "d": {"bytes": 3}, "e": None}
    assert second == {"a": None, "b": None, "d": None, "e": None}


@pytest.mark.fault(36)
def test_what_is_no_parquet_file():
    written([{"a": "x" * 99} for _ in range(9)], "rows.parquet")
    with open("rows.parquet", "rb") as file:
        whole = file.read()
    for content in (b"", b"a,b", whole[:-9], whole[:99]):
        with pytest.raises(DataError, match=r"rows\.parquet is no parquet file, or is cut off"):
            found(content, "rows.parquet")
    damaged = whole[:8] + bytes(len(whole[8:40])) + whole[40:]
    with pytest.raises(DataError, match=r"rows\.parquet: row 1: damaged"):
        found(damaged, "rows.parquet")


@pytest.mark.fault(36)
def test_a_text_of_parquet_that_is_no_utf_8():
    values = pa.array([b"ok", b"b\xffd", b"fine"])
    unchecked = pa.Array.from_buffers(pa.string(), 3, values.buffers())
    pq.write_table(pa.table({"a": unchecked}), "rows.parquet")
    source = read("rows.parquet")
    assert [str(fault) for fault in source.faults] == ["rows.parquet:row 2: invalid UTF-8 at byte 2 of a text"]
    assert [row["a"] for _, row in source.rows] == ["ok", "fine"]
