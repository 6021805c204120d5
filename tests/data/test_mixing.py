"""Several sources: every row once, or shares by weight; a pure function of seed and epoch, resumed at any place."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftctl.data.batches import Batches
from peftctl.data.dataset import prepare
from peftctl.data.encoded import Dataset
from peftctl.data.mixing import held_out, joined
from peftctl.data.order import Buckets, Mix, examples
from peftctl.errors import DataError
from peftctl.objectives import get
from peftctl.row import Row
from peftctl.schema import DataConfig
from tests.data.test_dataset import recipe, talk, write

SFT = get("sft")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dataset(name: str, n: int) -> Dataset:
    rows = [(Row((1, ord(name), 10 + i), (0.0, 1.0, 1.0), i),) for i in range(n)]
    return Dataset(name, tuple(rows), tuple(f"{name}:{i + 1}" for i in range(n)), f"sha of {name}")


def test_joined_data_sets_are_one():
    data = joined([dataset("a", 3), dataset("b", 2), dataset("c", 1)])
    assert data.name == "a, b, c" and len(data) == 6 and data.mix is None
    assert list(data.places) == ["a:1", "a:2", "a:3", "b:1", "b:2", "c:1"]
    assert [row.example for row in data.rows(range(6))] == list(range(6))
    assert [chr(row.ids[1]) for row in data.rows(range(6))] == list("aaabbc") and list(data.sizes()) == [3] * 6
    assert [tuple(origin) for origin in data.origins] == [
        ("a", "sha of a", 3, 3),
        ("b", "sha of b", 2, 2),
        ("c", "sha of c", 1, 1),
    ]
    assert data.subset([4, 1]).places == ("b:2", "a:2") and joined([dataset("a", 3)]).name == "a"


@pytest.mark.parametrize(
    ("weights", "counts"), [((1, 1), (5, 5)), ((9, 1), (9, 1)), ((0.5, 0.25), (7, 3)), ((2, 1), (7, 3))]
)
def test_weights_decide_the_shares_of_an_epoch(weights, counts):
    assert joined([dataset("a", 8), dataset("b", 2)], weights).mix == Mix((8, 2), counts)


def test_a_weight_that_gives_nothing_is_refused():
    with pytest.raises(DataError, match=r"b: weight 0.001 gives it none of the 10 examples of an epoch"):
        joined([dataset("a", 8), dataset("b", 2)], (1, 0.001))


@st.composite
def mixes(draw) -> Mix:
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    counts = draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    short = sum(sizes) - sum(counts)
    sizes[0], counts[0] = sizes[0] + max(0, -short), counts[0] + max(0, short)
    return Mix(tuple(sizes), tuple(counts))


@settings(max_examples=60, deadline=None)
@given(mixes(), st.integers(0, 3), st.integers(1, 7))
def test_every_source_is_gone_through_in_turn(mix, seed, epochs):
    """Of each source the epochs together have counts x epochs examples, every row as often as any other, or once more;
    and an epoch has exactly its counts."""
    n = sum(mix.sizes)
    starts = [sum(mix.sizes[:part]) for part in range(len(mix.sizes))]
    seen = examples(0, n * epochs, n, seed, mix=mix)
    for part, (start, size, count) in enumerate(zip(starts, mix.sizes, mix.counts, strict=True)):
        own = Counter(one for one in seen if start <= one < start + size)
        assert own.total() == count * epochs
        assert max(own.values()) - min(own[one] for one in range(start, start + size)) <= 1
        for epoch in range(epochs):
            inside = seen[n * epoch : n * (epoch + 1)]
            assert sum(start <= one < start + size for one in inside) == count, part


@settings(max_examples=60, deadline=None)
@given(mixes(), st.integers(0, 3), st.lists(st.integers(0, 40), min_size=1, max_size=6), st.booleans())
def test_any_cuts_of_a_mix_give_the_same_stream(mix, seed, cuts, bucketed):
    n = sum(mix.sizes)
    buckets = Buckets([(7 * i) % 5 for i in range(n)], 2, 2) if bucketed else None
    whole = examples(0, sum(cuts), n, seed, buckets, mix)
    at, parts = 0, []
    for cut in cuts:
        parts += examples(at, cut, n, seed, buckets, mix)
        at += cut
    assert parts == whole


def test_seeds_and_epochs_differ():
    mix = Mix((30, 10), (20, 20))
    epochs = [tuple(examples(40 * epoch, 40, 40, seed, mix=mix)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(epochs)) == 4


def test_batches_follow_the_mix():
    data = joined([dataset("a", 6), dataset("b", 2)], (1, 1))
    batches = Batches(data, batch_size=4, seed=5)
    (first, second), _ = (batches.step(0)[0] + batches.step(4)[0], None)
    assert sorted([*first.examples, *second.examples]) == sorted(examples(0, 8, 8, 5, mix=data.mix))


def config(**data):
    return dict(DataConfig(**data))


def test_a_recipe_names_several(here, chat):
    write(here, *[talk("q", f"a{i}") for i in range(8)], name="a.jsonl")
    write(here, *[{"frage": "q", "antwort": f" b{i}"} for i in range(4)], name="b.jsonl")
    (here / "more").mkdir()
    write(here, talk("q", "held out"), name="more/c.jsonl")
    sources = ["a.jsonl", {"path": "b.jsonl", "columns": {"prompt": "frage", "completion": "antwort"}, "limit": 3}]
    found = prepare(recipe(**config(train=sources, validation=["more/c.jsonl", "a.jsonl"], limit=5)), chat, SFT)
    assert list(found.train.places) == [f"a.jsonl:{i}" for i in range(1, 6)] + [f"b.jsonl:{i}" for i in range(1, 4)]
    assert (found.report.name, found.report.kind) == ("a.jsonl, b.jsonl", "messages, completion")
    assert (found.report.read, found.report.kept, found.report.longest > 0) == (8, 8, True)
    assert found.train.mix is None and list(found.validation.places)[:2] == ["more/c.jsonl:1", "a.jsonl:1"]
    sources = [{"path": name, "weight": weight} for name, weight in (("a.jsonl", 1), ("more", 3))]
    found = prepare(recipe(**config(train=sources)), chat, SFT)
    assert found.train.mix == Mix((8, 1), (2, 7))


def test_a_share_is_held_out_of_each(here, chat):
    write(here, *[talk("q", f"a{i}") for i in range(8)], name="a.jsonl")
    write(here, talk("q", "b"), name="b.jsonl")
    found = prepare(recipe(**config(train=["a.jsonl", "b.jsonl", "a.jsonl"], validation=0.25)), chat, SFT)
    assert len(found.train) == 13 and len(found.validation) == 4
    assert not {*found.train.places} & {*found.validation.places} and "b.jsonl:1" in found.train.places
    with pytest.raises(DataError, match="b, c has one row each, of which none can be held out"):
        held_out([dataset("b", 1), dataset("c", 1)], 0.5, 0)


def test_faults_of_all_are_told_by_their_file(here, chat):
    write(here, talk("q", "a"), name="a.jsonl")
    write(here, json.dumps(talk("q", "b")), "{", name="b.jsonl")
    with pytest.raises(DataError, match=r"^b.jsonl:2: invalid JSON"):
        prepare(recipe(**config(train=["a.jsonl", "b.jsonl"])), chat, SFT)
    report = prepare(recipe(**config(train=["b.jsonl", "b.jsonl"], on_bad_row="skip")), chat, SFT).report
    assert report.refused == 2 and [fault.place for fault in report.faults] == ["b.jsonl:2"] * 2
