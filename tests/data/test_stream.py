"""A streamed source: every row once an epoch, the same from any position, gone on with without reading all again."""

from __future__ import annotations

import gzip
import itertools
import json
import tracemalloc
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftctl.data import stream as streams
from peftctl.data import streamed
from peftctl.data.batches import Batches
from peftctl.data.dataset import prepare
from peftctl.data.sources import files
from peftctl.data.stream import Feed, Mixed, Stream, Windows
from peftctl.errors import DataError, InputError, Stopped
from peftctl.objectives import get
from peftctl.plan import Options, plan
from peftctl.row import Row
from peftctl.schema import DataConfig
from tests import runs
from tests.data.test_dataset import judged, learnt, recipe, talk

NUMBERS = count()
SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=3)


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


def feed(pattern: str, limit: int | None = None) -> Feed:
    return Feed(pattern, files(pattern), SimpleNamespace(), limit)


def opened(pattern: str, seed: int = 0, window: int = 4, skip: bool = True, held: tuple[str, ...] = ()) -> Stream:
    own = feed(pattern)
    return Stream(pattern, own.fingerprint, Windows([own], seed, window), seed, skip, held)


def mixed(*feeds: Feed, weights: tuple[float, ...] = (), seed: int = 0, window: int = 4) -> Stream:
    """Several, one after the other or by weight."""
    if not weights:
        return Stream("all", "", Windows(feeds, seed, window), seed, skip=True)
    names = [one.name for one in feeds]
    rows = Mixed([Windows([one], seed, window) for one in feeds], names, weights, seed)
    return Stream("all", "", rows, seed, skip=True)


def write(sizes: list[int], kind: str = "jsonl", first: int = 0) -> str:
    """Files of numbered rows; the pattern that means them."""
    folder = Path(f"rows{next(NUMBERS)}")
    folder.mkdir()
    numbers = iter(range(first, 9000))
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


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(SIZES, st.none() | st.integers(1, 9)), min_size=1, max_size=3),
    st.integers(1, 9),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
)
def test_of_each_source_its_first_rows_alone(sources, window, cuts):
    feeds = [feed(write(sizes, first=100 * n), limit) for n, (sizes, limit) in enumerate(sources, 1)]
    rows = [100 * n + k for n, (sizes, limit) in enumerate(sources, 1) for k in range(min(sum(sizes), limit or 99))]
    seen = numbers(mixed(*feeds, window=window).take(0, 3 * len(rows))[0])
    for epoch in range(3):
        assert sorted(seen[epoch * len(rows) : (epoch + 1) * len(rows)]) == rows
    position, parts = 0, []
    for number, cut in enumerate(cuts):
        if number % 2:
            for path in Path("cache/streams").iterdir():
                path.unlink()
        data, position = mixed(*feeds, window=window).take(position, cut)
        parts += numbers(data)
    assert parts == numbers(mixed(*feeds, window=window).take(0, sum(cuts))[0])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.sampled_from([1.0, 2.0, 0.5])), min_size=2, max_size=3),
    st.integers(1, 5),
    st.integers(0, 2),
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
)
def test_by_weight_each_source_is_gone_through_in_turn(sources, window, seed, cuts):
    """Of every so many rows each source has its share, and none of its own comes again before all have come."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "BLOCK", 20)
        feeds = [feed(write([size], first=100 * n)) for n, (size, _) in enumerate(sources, 1)]
        weights = tuple(weight for _, weight in sources)
        seen = numbers(mixed(*feeds, weights=weights, seed=seed, window=window).take(0, 100)[0])
        shares = [20 * weight / sum(weights) for weight in weights]
        for start in range(0, 100, 20):
            counts = [sum(row // 100 == n for row in seen[start : start + 20]) for n in range(1, len(sources) + 1)]
            assert all(abs(count - share) < 1 for count, share in zip(counts, shares, strict=True))
        for n, (size, _) in enumerate(sources, 1):
            own = [row for row in seen if row // 100 == n]
            for start in range(0, len(own) - size + 1, size):
                assert sorted(own[start : start + size]) == list(range(100 * n, 100 * n + size))
        position, parts = 0, []
        for cut in cuts:
            data, position = mixed(*feeds, weights=weights, seed=seed, window=window).take(position, cut)
            parts += numbers(data)
        assert parts == numbers(mixed(*feeds, weights=weights, seed=seed, window=window).take(0, sum(cuts))[0])


def test_a_weight_that_gives_nothing_and_sources_without_a_usable_row_are_told():
    one, other = feed(write([3])), feed(write([3]))
    with pytest.raises(DataError, match=r"weight 0.001 gives it none of 1,000 rows"):
        mixed(one, other, weights=(9, 0.001))
    bad = [feed(write([1], first=13)), feed(write([1], first=13))]
    with pytest.raises(DataError, match=r"all: no row can be used; one is rows\d+/0.jsonl:1: no row"):
        mixed(*bad, weights=(9, 1)).take(0, 1)


def test_what_is_held_out_never_comes():
    pattern = write([12])
    held = tuple(f"{Path(pattern).parent}/0.jsonl:{2 * n + 1}" for n in (3, 4, 11))
    seen = numbers(opened(pattern, held=held).take(0, 18)[0])
    rest = [n for n in range(12) if n not in (3, 4, 11)]
    assert sorted(seen[:9]) == sorted(seen[9:]) == rest
    every = tuple(f"{Path(pattern).parent}/0.jsonl:{2 * n + 1}" for n in range(12))
    with pytest.raises(DataError, match=r"no row can be used; one is .*: it is held out"):
        opened(pattern, held=every).take(0, 1)


def stepped(pattern: str, position: int = 0, steps: int = 9, **options) -> tuple[list[list[int]], int]:
    """The numbers of each step's rows, which are as long as their number says."""
    whole = opened(pattern, window=50)
    batches = Batches(whole.take(0, 3)[0], batch_size=2, gradient_accumulation=2, stream=opened(pattern), **options)
    found = []
    for _ in range(steps):
        data, chosen, position = batches.chosen(position)
        found.append([data.examples[index][0].ids[0] for index in chosen])
    return found, position


def test_steps_of_a_bucket_are_of_like_length_from_any_position(monkeypatch):
    def pieces(job, row):
        size = int(row["n"]) * 7 % 30
        if size == 0:
            raise DataError("no row")
        return [(Row((int(row["n"]), *[0] * size), (0.0,) + (1.0,) * size),)], size

    monkeypatch.setattr(streams, "pieces", pieces)
    pattern = write([60])
    plain, _ = stepped(pattern, steps=12)
    whole, _ = stepped(pattern, steps=12, bucket=3)
    for start in range(0, 12, 3):
        before, after = ([n for step in steps[start : start + 3] for n in step] for steps in (plain, whole))
        assert sorted(before) == sorted(after)  # the rows that would have come anyway
        spans = sorted(
            (min(n * 7 % 30 for n in step), max(n * 7 % 30 for n in step)) for step in whole[start : start + 3]
        )
        assert all(low[1] <= high[0] for low, high in itertools.pairwise(spans))
    assert whole != plain
    for cut in range(1, 8):
        first, position = stepped(pattern, steps=cut, bucket=3)
        assert first + stepped(pattern, position, 12 - cut, bucket=3)[0] == whole


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


def several(here: Path, objective: str) -> dict:
    """A recipe that streams two sources by weight, less what is held out of them, sorted by length."""
    name = runs.data(objective)
    lines = name.read_text().splitlines()
    for part, own in enumerate((lines[:7], lines[4:])):
        (here / f"{part}.jsonl").write_text("\n".join(own))
    sources = [{"path": str(here / f"{part}.jsonl"), "weight": 2 - part} for part in (0, 1)]
    data = {"train": [sources[0] | {"limit": 5}, sources[1]], "streaming": True, "shuffle_buffer": 3, "limit": 7}
    more = {"iterations": 2} if objective == "grpo" else {}
    return runs.document(
        *("lora", objective),
        data=data | {"validation": 0.3, "bucket": 2},
        train={"save_every": 1, "keep": 9},
        objective=more,
    )


@pytest.mark.parametrize("objective", ["sft", "kto", "grpo"])
def test_all_that_is_streamed_is_gone_on_with_bit_for_bit(here, monkeypatch, objective):
    monkeypatch.undo()
    monkeypatch.setenv("PEFTCTL_CACHE", str(here / "cache"))
    whole, pieces = here / "whole", here / "pieces"
    result = runs.train(whole, several(here, objective))
    assert result["steps"] == 4 and result["validation_loss"] is not None
    for cut in (1, 3):
        with pytest.raises(Stopped), runs.stopped_after(cut, pieces):
            runs.train(pieces, several(here, objective), resume=cut > 1)
        for path in Path(here / "cache" / "streams").iterdir():
            path.unlink()
    runs.train(pieces, several(here, objective), resume=True)
    assert runs.bits(pieces) == runs.bits(whole) and runs.untimed(pieces) == runs.untimed(whole)


def prepared(here: Path, chat, objective: str = "sft", **data):
    chosen = get(objective)
    return prepare(
        recipe(chosen.config(name=objective), **dict(DataConfig(streaming=True, **data))), chat, chosen, every_row=True
    )


@pytest.fixture
def real(monkeypatch, here):
    """Rows are encoded as they are elsewhere; the first four of a source are looked at before training."""
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setenv("PEFTCTL_CACHE", str(here / "cache"))
    monkeypatch.setattr(streamed, "HEAD", 4)


def talks(count: int, first: int = 0) -> str:
    return "".join(json.dumps(talk("q", f"answer {first + n}")) + "\n" for n in range(count))


def test_every_row_is_read_for_the_report_though_none_is_kept(here, chat, real):
    Path("a.jsonl").write_text(talks(9) + json.dumps(talk("q")) + "\n" + talks(2, 20))
    Path("b.csv").write_text("frage,antwort\nq, b\nq, c\n")
    sources = ["a.jsonl", {"path": "b.csv", "columns": {"prompt": "frage", "completion": "antwort"}}]
    found = prepared(here, chat, train=sources, on_bad_row="skip")
    told = found.document()
    assert (told["rows"], told["kept"], told["refused"], told["train_examples"]) == (14, 13, 1, 13)
    assert len(told["faults"]) == 1 and "no assistant turn" in told["faults"][0]
    assert sum(count for *_, count in told["histogram"]) == 13 and told["format"] == "messages, completion"
    assert len(found.train) == 6  # what is kept of them
    with pytest.raises(DataError, match=r"a.jsonl:10: .*\na.jsonl: 1 of 12 rows cannot be used"):
        prepared(here, chat, train=sources)
    rows = found.stream.take(0, 13)[0]
    assert sorted(rows.places) == sorted([*(f"a.jsonl:{n}" for n in (*range(1, 10), 11, 12)), "b.csv:2", "b.csv:3"])


def test_a_share_is_held_out_of_each_sources_first_rows(here, chat, real):
    Path("a.jsonl").write_text(talks(20))
    Path("b.jsonl").write_text(talks(8, 50) + talks(2))
    found = prepared(here, chat, train=["a.jsonl", "b.jsonl"], validation=0.25, shuffle_buffer=8)
    held = {*found.validation.places}
    assert [sum(place.startswith(name) for place in held) for name in "ab"] == [2, 2]
    assert {int(place.split(":")[1]) for place in held} <= set(range(1, 9))
    assert found.document()["train_examples"] == 26 and found.document()["validation_examples"] == 4
    seen = found.stream.take(0, 26)[0].places
    assert len({*seen}) == 26 and not held & {*seen} and len(found.train) == 12
    again = prepared(here, chat, train=["a.jsonl", "b.jsonl"], validation=0.25, shuffle_buffer=8)
    assert {*again.validation.places} == held
    leaked = [place for place in held if place.startswith("a") and int(place.split(":")[1]) <= 2]
    assert found.leaked == len(leaked)  # the two that stand in b.jsonl once more, beyond its first rows


def test_held_out_rows_that_come_late_are_found_among_all(here, chat, real):
    Path("a.jsonl").write_text(talks(20))
    Path("held.jsonl").write_text(talks(1, 17) + talks(1, 30))
    found = prepared(here, chat, train="a.jsonl", validation="held.jsonl")
    assert found.leaked == 1 and "trained on as well" in found.warnings[0]


def test_judged_answers_get_those_of_rows_taken_with_them(here, chat, real):
    rows = [judged(f"question {n}", f"answer {n}", n % 2 == 0) for n in range(200)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = prepared(here, chat, "kto", train="a.jsonl").stream
    batches = Batches(stream.take(0, 4)[0], batch_size=4, stream=stream)
    position, own, given = 0, [], []
    for _ in range(batches.group):
        data, chosen, position = batches.chosen(position)
        own += [learnt(chat, data.examples[index][0]) for index in chosen]
        given += [learnt(chat, data.examples[index][1]) for index in chosen]
    assert len(own) == len({*own}) == 64
    assert all(one != other for one, other in zip(own, given, strict=True))
    cut = [answer.removesuffix("<|im_end|>") for answer in given]
    assert len({*cut}) == 64 and all(any(one.startswith(answer) for one in own) for answer in cut)


def test_to_read_every_row_takes_no_memory_of_its_own(here, chat, real):
    row = Row((7,) * 200, (1.0,) * 200)
    quick = SimpleNamespace(**{**vars(get("sft")), "encode": lambda example, encoder, config: (row,)})

    def peak(count: int) -> int:
        Path("rows.jsonl").write_text(f'{{"prompt": "{"sat " * 150}", "completion": " on"}}\n' * count)
        config = recipe(**dict(DataConfig(train="rows.jsonl", streaming=True)))
        tracemalloc.start()
        assert prepare(config, chat, quick, every_row=True).report.kept == count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(1000), peak(4000)
    assert (many - few) / 3000 < 4  # bytes a row; its place and figures alone would take 33


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ({"train": {"max_steps": None}}, "train.max_steps must be given with data.streaming"),
        ({"data": {"truncate": "split"}}, "data.truncate split is not for data.streaming"),
        (
            {"data": {"train": [{"path": "a.csv", "weight": 1}, "b.csv"]}},
            "data.train has a weight for some sources only",
        ),
    ],
)
def test_what_streaming_cannot_do_is_refused(here, blocks, said):
    found = contents(here)
    with pytest.raises(InputError, match=said):
        runs.loaded(here / "run", {key: value | blocks.get(key, {}) for key, value in found.items()})


def test_labels_of_a_stream_must_be_named(here):
    task = {"model": {"task": "sequence-classification"}, "objective": {"name": "classification"}}
    found = runs.document("lora", "classification", data={"streaming": True}, **{"model": task["model"]})
    with pytest.raises(DataError, match=r"objective.labels: name the labels; with data.streaming the rows are not all"):
        plan(runs.loaded(here / "run", found), Options(quiet=True))
