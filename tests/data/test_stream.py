"""A streamed source: every row once an epoch, the same from any position, gone on with without reading all again."""

from __future__ import annotations

import gzip
import json
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftctl.data import stream as streams
from peftctl.data.sources import files
from peftctl.data.stream import Stream
from peftctl.errors import DataError, InputError, Stopped
from peftctl.row import Row
from tests import runs

NUMBERS = count()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A row's one token is its number; 13 is no row."""

    def pieces(job, row):
        if isinstance(row, str) or int(row["n"]) == 13:
            raise DataError("no row")
        return [(Row((int(row["n"]), 0), (0.0, 1.0)),)], 2

    monkeypatch.setattr(streams, "pieces", pieces)
    monkeypatch.setattr(streams, "EVERY", 3)


def opened(pattern: str, seed: int = 0, window: int = 4, skip: bool = True) -> Stream:
    return Stream(pattern, files(pattern), SimpleNamespace(), seed, window, skip)


def write(sizes: list[int], kind: str = "jsonl") -> str:
    """Files of numbered rows; the pattern that means them."""
    folder = Path(f"rows{next(NUMBERS)}")
    folder.mkdir()
    numbers = iter(range(1000))
    for part, size in enumerate(sizes):
        rows = [{"n": next(numbers)} for _ in range(size)]
        path = folder / f"{part}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
        elif kind == "csv":
            path.write_text("n\n" + "".join(f"{row['n']}\n" for row in rows))
        else:
            text = "".join(json.dumps(row) + "\n\n" for row in rows).encode()
            path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    return str(folder / f"*.{kind}")


def numbers(data) -> list[int]:
    return [row.ids[0] for row in data.rows(range(len(data)))]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 12),
    st.integers(0, 3),
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.sampled_from(["jsonl", "csv", "parquet", "jsonl.gz"]),
)
def test_the_same_from_any_position(sizes, window, seed, cuts, kind):
    pattern = write(sizes, kind)
    total = sum(sizes)
    usable = total - (total > 13)
    whole, _ = opened(pattern, seed, window).take(0, 3 * usable)
    seen = numbers(whole)
    for epoch in range(3):
        assert sorted(seen[epoch * usable : (epoch + 1) * usable]) == [n for n in range(total) if n != 13]
    position, parts = 0, []
    for number, cut in enumerate(cuts):
        if number % 2:  # the marks of the runs before are lost
            for path in Path("cache/streams").iterdir():
                path.unlink()
        data, position = opened(pattern, seed, window).take(position, cut)
        parts += numbers(data)
    assert parts == numbers(opened(pattern, seed, window).take(0, sum(cuts))[0])


def test_a_window_is_shuffled_and_epochs_and_seeds_differ():
    pattern = write([12])
    seen = numbers(opened(pattern, window=12).take(0, 24)[0])
    assert seen[:12] != sorted(seen[:12]) and seen[:12] != seen[12:]
    assert seen[:12] != numbers(opened(pattern, seed=1, window=12).take(0, 12)[0])
    assert numbers(opened(pattern, window=1).take(0, 12)[0]) == list(range(12))
    first = numbers(opened(pattern, window=4).take(0, 12)[0])
    assert [sorted(first[start : start + 4]) for start in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.fault(8)
def test_going_on_reads_no_more_than_a_window_and_the_rows_since_a_mark(kind, monkeypatch):
    pattern = write([400, 300], kind)
    _, position = opened(pattern).take(0, 600)
    read = []
    given = streams.code
    monkeypatch.setattr(streams, "code", lambda part, line: read.append(line) or given(part, line))
    data, _ = opened(pattern).take(position, 4)
    assert len(data) == 4 and len(read) <= 8
    opened(pattern).take(5 * 700 + 350, 4)  # epochs are passed over without reading: their rows are known
    assert len(read) <= 708


@pytest.mark.fault(36, 37)
def test_a_row_that_cannot_be_used_is_passed_over_or_told():
    pattern = write([16])
    with pytest.raises(DataError, match=r"0.jsonl:27: no row; data.on_bad_row: skip leaves such rows out"):
        opened(pattern, skip=False).take(0, 16)
    data, position = opened(pattern, window=1).take(12, 2)
    assert numbers(data) == [12, 14] and position == 15 and data.places[1].endswith("0.jsonl:29")
    Path("bad.jsonl").write_text("{\n" * 5)
    with pytest.raises(DataError, match=r"bad.jsonl: no row can be used; one is bad.jsonl:\d: no row"):
        opened("bad.jsonl").take(0, 1)


def test_marks_that_were_not_written_whole_are_ignored():
    pattern = write([30])
    plain = numbers(opened(pattern).take(0, 40)[0])
    [path] = Path("cache/streams").iterdir()
    for damaged in (path.read_bytes()[:-3], b"\xff", b"[1, 2]\n", b"nonsense", b""):
        path.write_bytes(damaged)
        assert numbers(opened(pattern).take(0, 40)[0]) == plain
    Path("cache/streams").rename("cache/elsewhere")
    Path("cache/streams").write_text("no folder")
    assert numbers(opened(pattern).take(0, 40)[0]) == plain


def test_a_changed_source_has_another_fingerprint():
    pattern = write([30])
    before = opened(pattern).fingerprint
    path = next(Path(pattern).parent.iterdir())
    path.write_text(path.read_text().replace('"n": 29', '"n": 28'))
    assert opened(pattern).fingerprint != before


def contents(here: Path, **data):
    """A recipe of a streamed file."""
    rows = (runs.CONFIGS / "data" / "messages.jsonl").read_text()
    (here / "rows.jsonl").write_text(rows)
    data = {"train": str(here / "rows.jsonl"), "streaming": True, "shuffle_buffer": 5, "limit": None, **data}
    held = {"validation": str(here / "rows.jsonl")}
    return runs.document(data=held | data, train={"save_every": 1, "keep": 9})


def test_a_streamed_run_is_gone_on_with_bit_for_bit(here, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PEFTCTL_CACHE", str(here / "cache"))
    whole, pieces = here / "whole", here / "pieces"
    runs.train(whole, contents(here), verify=True)
    for cut in (1, 3):
        with pytest.raises(Stopped), runs.stopped_after(cut, pieces):
            runs.train(pieces, contents(here), resume=cut > 1)
    runs.train(pieces, contents(here), resume=True)
    assert runs.bits(pieces) == runs.bits(whole) and runs.untimed(pieces) == runs.untimed(whole)
    with (here / "rows.jsonl").open("a") as file:
        file.write("\n")
    changed = json.loads(json.dumps(contents(here)))
    with (here / "rows.jsonl").open("a") as file:
        file.write("\n")
    changed["train"]["max_steps"] = 6
    with pytest.raises(InputError, match="the data's content"):
        runs.train(pieces, changed, resume=True)


WEIGHED = {"path": "a.csv", "weight": 1}


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ({"train": {"max_steps": None}}, "train.max_steps must be given with data.streaming"),
        ({"data": {"validation": 0.5}}, "data.validation is a share, which data.streaming cannot hold out"),
        ({"data": {"bucket": 2}}, "data.bucket is not for data.streaming"),
        ({"data": {"limit": 2}}, "data.limit is not for data.streaming"),
        ({"data": {"truncate": "split"}}, "data.truncate split is not for data.streaming"),
        (
            {"data": {"train": [{"path": "a.csv", "weight": 1}, {"path": "b.csv", "weight": 1}]}},
            "data.train has a weight",
        ),
        (
            {"data": {"train": [{"path": "a.csv", "format": "text"}, "b.csv"]}},
            "data.train has a format or columns of one",
        ),
        ({"objective": {"name": "kto"}}, "data.streaming is not for objective kto"),
    ],
)
def test_what_streaming_cannot_do_is_refused(here, blocks, said):
    found = contents(here)
    with pytest.raises(InputError, match=said):
        runs.loaded(here / "run", {key: value | blocks.get(key, {}) for key, value in found.items()})
