"""What is told of rows before training: figures, what is suspicious, rows as the loss sees them."""

from __future__ import annotations

import io
import json
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftctl.data import preflight
from peftctl.data.chat import Chat
from peftctl.data.dataset import load, prepare
from peftctl.data.encoded import digest
from peftctl.data.shown import plain, show
from peftctl.errors import DataError
from peftctl.objectives import get
from peftctl.row import Row
from tests.data.conftest import TEMPLATES
from tests.data.test_dataset import judged, pair, recipe, talk

SFT, DPO, KTO = get("sft"), get("dpo"), get("kto")
PLAIN = SFT.config(name="sft")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def chat(made):
    return Chat(made("chatml", merges=False))


def write(here, *rows: object, name: str = "train.jsonl") -> None:
    (here / name).write_text("\n".join(map(json.dumps, rows)))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60))
def test_figures_of_lengths(sizes):
    found = preflight.lengths(sizes)
    assert (found.median, found.longest) == (statistics.median_high(sizes), max(sizes))
    assert sum(size <= found.p90 for size in sizes) > 0.9 * len(sizes) - 1e-9 or found.p90 == max(sizes)
    assert sum(size < found.p90 for size in sizes) <= 0.9 * len(sizes)
    step = preflight.width(max(sizes))
    assert list(found.histogram) == [sum(n * step < size <= (n + 1) * step for size in sizes) for n in range(8)]


def test_bars():
    assert preflight.bars([[1, 10, 4], [11, 20, 0], [21, 30, 1]]) == [
        "   1 to 10  ################################ 4", f"  11 to 20  {' ' * 32} 0", f"  21 to 30  {'#' * 8:<32} 1"
    ]  # fmt: skip


def report(chat, **options):
    return load("train.jsonl", chat, SFT, PLAIN, **options)[1]


def test_a_report_counts_what_there_is(here, chat):
    write(here, talk("a", "b"), talk("a", "b", "c", "longer " * 9), {"messages": []}, {**talk("a", "b"), "id": 7})
    found = report(chat, on_bad_row="skip")
    data, _ = load("train.jsonl", chat, SFT, PLAIN, on_bad_row="skip")
    rows = data.rows(range(3))
    told = preflight.document(found)
    assert (told["rows"], told["kept"], told["refused"], told["sequences"]) == (4, 3, 1, 3)
    assert told["tokens"] == sum(len(row.ids) for row in rows)
    assert told["labelled_tokens"] == sum(sum(row.weights) for row in rows)
    assert told["labelled_share"] == pytest.approx(told["labelled_tokens"] / told["tokens"], abs=1e-6)
    assert (told["longest"], told["p50"]) == (len(rows[1].ids), len(rows[0].ids))
    assert told["faults"][0].startswith("train.jsonl:3: ") and told["unused"] == ["id"]
    assert sum(count for _, _, count in told["histogram"]) == 3 and told["histogram"][-1][1] >= told["longest"]
    assert json.loads(json.dumps(told)) == told and preflight.warnings(found) == []
    assert preflight.summary(found).startswith("train.jsonl: 3 rows (1 refused), p50 ")


def test_rows_that_would_not_teach_to_stop(here, made):
    write(here, talk("a", "b"))
    [told] = preflight.warnings(report(Chat(made("plain", merges=False))))
    assert told.startswith("only 0 of 1 sequences end with a label that ends an answer")


def test_bos_twice_or_not_at_all(here, made):
    write(here, {"prompt": "<|bos|><|bos|>a", "completion": "b"}, {"prompt": "a", "completion": "b"})
    chat = Chat(made(None, adds_bos=True))
    found = report(chat)
    assert (found.bos_doubled, found.bos_missing) == (1, 0)
    assert preflight.warnings(found) == ["sequences that begin with BOS twice (is it in the rows' text as well?): 1"]
    template = "{{ bos_token }}" + (TEMPLATES / "llama3.jinja").read_text()
    write(here, talk("a", "b"))
    assert report(Chat(made(None, adds_bos=True), template)).bos_doubled == 1
    missing = report(Chat(made("chatml", adds_bos=True)))
    assert missing.bos_missing == 1
    assert "that lack what the tokenizer puts before a text" in preflight.warnings(missing)[0]
    assert report(Chat(made("chatml"))).bos_missing == 0


def test_pad_that_is_eos_is_told_and_eos_stays_a_label(here, made):
    write(here, {"prompt": "a", "completion": "b"})
    chat = Chat(made(None, pad_token="<|eos|>"))
    assert chat.pad_is_eos and report(chat).ended == 1
    assert not Chat(made(None)).pad_is_eos and not Chat(made(None, pad_token="<|bos|>")).pad_is_eos


def test_rows_that_stand_twice(here, chat):
    write(here, talk("a", "b"), talk("a", "b"), talk("c", "d"), talk("e", "f"))
    write(here, talk("c", "d"), talk("g", "h"), talk("c", "d"), name="held.jsonl")
    found = prepare(recipe(validation="held.jsonl"), chat, SFT)
    assert (found.repeated, found.leaked) == (1, 2)
    assert any("trained on as well, so that the validation loss will flatter: 2" in text for text in found.warnings)
    assert any("more than once: 1" in text for text in found.notes())
    assert found.notes()[1].startswith("held.jsonl: 3 rows, ")
    write(here, talk("a", "b"), talk("a", "b"), talk("a", "b"))
    found = prepare(recipe(validation=0.4), chat, SFT)
    assert (found.repeated, found.leaked) == (1, 1)
    write(here, pair("q", "a", "b"), pair("q", "b", "a"), pair("q", "a", "b"))
    assert prepare(recipe(DPO.config(name="dpo")), chat, DPO).repeated == 1
    write(here, judged("q", "a", True), judged("q", "a", True))
    assert prepare(recipe(KTO.config(name="kto")), chat, KTO).repeated == 1


def test_several_sources_are_told_as_one(here, chat):
    write(here, talk("a", "b"), talk("a", "longer " * 9))
    write(here, {"prompt": "a", "completion": "b"}, talk("a", "b"), name="other.jsonl")
    found = prepare(
        recipe(train=["train.jsonl", {"path": "other.jsonl", "format": "completion"}], on_bad_row="skip"), chat, SFT
    )
    told, rows = found.document(), found.train.rows(range(len(found.train)))
    assert (told["rows"], told["kept"], told["refused"], told["sequences"]) == (4, 3, 1, 3)
    assert (told["format"], told["name"]) == ("messages, completion", "train.jsonl, other.jsonl")
    assert told["longest"] == max(len(row.ids) for row in rows) and told["tokens"] == sum(len(row.ids) for row in rows)
    assert sum(count for *_, count in told["histogram"]) == 3 and told["repeated"] == 0
    found = prepare(recipe(train=["train.jsonl", "train.jsonl"]), chat, SFT)
    assert (found.repeated, len(found.train)) == (2, 4)


def test_examples_are_told_apart_by_their_rows():
    rows = [(Row((1, 2), (0.0, 1.0)),), (Row((1, 2, 3), (0.0, 1.0, 1.0)),)]
    apart, joined = (Row((1,), (0.0,)), Row((2,), (0.0,))), (Row((1, 2), (0.0, 1.0)),)
    assert len({digest(one) for one in (*rows, apart)}) == 3 and digest(joined) == digest(rows[0])


def test_rows_of_which_nothing_is_learnt_are_counted(here, chat):
    unlearnt = talk("a", "b")["messages"]
    rows = [{"messages": [unlearnt[0], unlearnt[1] | {"train": False}]}, talk("a"), talk("long " * 50, "b")]
    write(here, talk("a", "b"), *rows)
    with pytest.raises(DataError, match="3 of 4 rows cannot be used"):
        load("train.jsonl", chat, SFT, PLAIN, max_length=100)
    found = report(chat, on_bad_row="skip", max_length=100)
    assert preflight.warnings(found) == ["rows left out because no token of theirs would be learnt: 3"]
    assert [fault.place for fault in found.faults] == [f"train.jsonl:{n}" for n in (2, 3, 4)]


def test_rows_as_the_loss_sees_them(chat):
    text = "<|im_start|>user\nä\t<|im_end|>"
    ids = chat.prompt(text)
    row = Row(ids, tuple(1.0 if chat.token(i) == "<|im_end|>" else 0.0 for i in ids))
    assert plain(row, chat) == "<|im_start|>|u|s|e|r|\\n\n|ä|\\t[[<|im_end|>]]"
    assert plain(Row(chat.prompt("abcd"), (1.0, 1.0, 0.5, 0.0)), chat) == "a[[b]][[0.5: c]]d"
    assert plain(Row(chat.prompt("ab"), (1.0, 1.0), targets=(2, 3)), chat) == "[[a|b]]"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_rows_in_colour_on_a_terminal(chat, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    rows = [(Row(chat.prompt("ab"), (0.0, 1.0)),)]
    screen, pipe = Terminal(), io.StringIO()
    show(rows, ["f:1"], chat, screen)
    show(rows, ["f:1"], chat, pipe)
    assert "\x1b[1;32" in screen.getvalue() and "[[" not in screen.getvalue()
    assert "a[[b]]" in pipe.getvalue() and "\x1b" not in pipe.getvalue() and "f:1 2 tokens" in pipe.getvalue()
