"""Rows that are too long: what is cut, what is never cut, and that pieces of a text lose nothing and see no other."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftctl.batch import build
from peftctl.data.chat import Chat
from peftctl.data.dataset import load, prepare
from peftctl.data.truncation import fitted
from peftctl.errors import DataError
from peftctl.head import head_of
from peftctl.methods.attachment import Attachment
from peftctl.objectives import get
from peftctl.policy import Layout, Policy
from peftctl.row import Row, judged
from tests.data.labelled import labelled
from tests.data.test_dataset import recipe
from tests.models import tiny

SFT = get("sft")
PLAIN = SFT.config(name="sft")
BOS = (0,)


def row(weights: str, role: str = "", start: int = 1) -> Row:
    """BOS, then tokens that count up; `x` is a label."""
    return Row((0, *range(start, start + len(weights))), (0.0, *(float(w == "x") for w in weights)), role=role)


def cut(rows: tuple[Row, ...], how: str, limit: int) -> list[tuple[int, ...]]:
    [found] = fitted(rows, limit, how, BOS)
    return [own.ids for own in found]


def test_what_fits_stays_as_it_is():
    for how in ("refuse", "left", "right", "split"):
        assert fitted((row("..xx"),), 5, how, BOS) == [(row("..xx"),)]


def test_right_cuts_the_end():
    assert cut((row("..xxxx"),), "right", 4) == [(0, 1, 2, 3)]
    with pytest.raises(DataError, match=r"the prompt alone has 5 tokens, and data\.max_length 5 leaves no answer room"):
        cut((row("....xx"),), "right", 5)
    pair = (row("..xx", "chosen"), row("..xxxxx", "rejected"))
    assert cut(pair, "right", 6) == [(0, 1, 2, 3, 4), (0, 1, 2, 3, 4, 5)]


def test_left_keeps_bos_and_the_last_answer():
    assert cut((row("....xx"),), "left", 4) == [(0, 4, 5, 6)]
    [(found,)] = fitted((row(".xx..xx"),), 5, "left", BOS)
    assert found == Row((0, 4, 5, 6, 7), (0.0, 0.0, 0.0, 1.0, 1.0))
    assert cut((row("..xxxx"),), "left", 5) == [(0, 3, 4, 5, 6)]
    with pytest.raises(DataError, match=r"the answer alone has 4 tokens, for which data\.max_length 4 leaves no room"):
        cut((row("..xxxx"),), "left", 4)


def test_without_bos_a_token_of_the_prompt_stays_before_the_answer():
    whole = Row((7, 8, 9, 10), (0.0, 0.0, 1.0, 1.0))
    assert fitted((whole,), 3, "left") == [(whole.part(1, 4),)]
    with pytest.raises(DataError, match=r"the answer alone has 2 tokens, for which data\.max_length 2 leaves no room"):
        fitted((whole,), 2, "left")


def test_a_pair_that_differs_no_more_is_refused():
    pair = (row("..xxx", "chosen"), row("..xxxxx", "rejected"))
    with pytest.raises(DataError, match=r"chosen and rejected are the same up to data\.max_length 6; a pair must"):
        cut(pair, "right", 6)
    assert len(cut(pair, "right", 7)) == 2


def test_left_cuts_a_pairs_prompt_alike():
    pair = (row("....xx", "chosen"), row("....xxx", "rejected"))
    assert cut(pair, "left", 6) == [(0, 3, 4, 5, 6), (0, 3, 4, 5, 6, 7)]
    with pytest.raises(DataError, match="the answer alone"):
        cut(pair, "left", 3)


def test_what_is_said_of_a_row_stays_at_its_end():
    assert fitted((judged((0, 1, 2, 3, 9), 2),), 3, "right") == [(judged((0, 1, 9), 2),)]
    assert fitted((judged((0, 1, 2, 3, 9), 2),), 3, "left", BOS) == [(judged((0, 3, 9), 2),)]


def test_refusals_tell_the_prompt_from_the_row():
    with pytest.raises(DataError, match=r"the row has 7 tokens, more than data\.max_length 6; data\.truncate may cut"):
        cut((row("....xx"),), "refuse", 6)
    with pytest.raises(DataError, match="the rejected answer's row has 9"):
        cut((row("..x", "chosen"), row("..xxxxxx", "rejected")), "refuse", 6)


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(2, 12), st.sampled_from(["left", "right"]))
def test_a_cut_row_is_the_old_one_without_a_run(labels, limit, how):
    whole = row("".join("x" if label else "." for label in labels) + "x")  # a row without labels does not come so far
    try:
        [(found,)] = fitted((whole,), limit, how, BOS)
    except DataError:
        return
    assert len(found.ids) == min(limit, len(whole.ids)) and found.ids[0] == 0
    kept = dict(zip(whole.ids, whole.weights, strict=True))
    assert [kept[token] for token in found.ids] == list(found.weights)
    if how == "left":
        assert found.ids[-1] == whole.ids[-1]
    gaps = [b - a for a, b in pairwise(found.ids)]
    assert sum(gap > 1 for gap in gaps) <= (how == "left")


@given(st.integers(2, 60), st.integers(2, 12))
def test_pieces_learn_every_token_once(size, limit):
    whole = Row(tuple(range(size)), (1.0,) * size)
    pieces = [piece for (piece,) in fitted((whole,), limit, "split")]
    learnt = [token for piece in pieces for token, w in zip(piece.ids[1:], piece.weights[1:], strict=True) if w]
    assert learnt == list(range(1, size)) and all(2 <= len(piece.ids) <= limit for piece in pieces)
    assert all(a.ids[-1] == b.ids[0] for a, b in pairwise(pieces))


@pytest.fixture(scope="module")
def chat(made):
    return Chat(made("chatml", merges=False, adds_bos=True))


def write(here, *rows: object) -> None:
    (here / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_a_file_of_texts_in_pieces(tmp_path, monkeypatch, chat):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"text": "abcdefgh"}, {"text": "xy"})
    with pytest.raises(DataError, match=r"train.jsonl:1: the row has 10 tokens, more than data\.max_length 5"):
        load("train.jsonl", chat, SFT, PLAIN, max_length=5)
    data, report = load("train.jsonl", chat, SFT, PLAIN, max_length=5, truncate="split")
    assert [labelled(chat, (r.ids, r.weights)) for r in data.rows(range(4))] == [
        "<|bos|>[[abcd]]", "d[[efgh]]", "h[[<|eos|>]]", "[[<|bos|>xy<|eos|>]]"
    ]  # fmt: skip
    assert list(data.places) == ["train.jsonl:1"] * 3 + ["train.jsonl:2"]
    assert (report.read, report.kept, report.truncated, len(data)) == (2, 2, 1, 4)
    assert report.labelled_tokens == 9 + 3 and report.ended == 2 and report.longest == 5


def test_texts_are_held_out_whole(tmp_path, monkeypatch, chat):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, *({"text": "abcdefgh" * (1 + i % 3)} for i in range(10)))
    found = prepare(recipe(max_length=5, truncate="split", validation=0.3), chat, SFT)
    assert len(set(found.validation.places)) == 3 and not set(found.train.places) & set(found.validation.places)
    write(tmp_path, {"text": "abcdefgh" * 9})
    found = prepare(recipe(max_length=5, truncate="split", validation=0.3), chat, SFT)
    assert len(found.train) + len(found.validation) == 19 and len(found.validation) == 6


def test_only_texts_are_split(tmp_path, monkeypatch, chat):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"prompt": "a", "completion": "b"})
    with pytest.raises(DataError, match=r"train.jsonl has prompts with .*; data\.truncate: split is for raw text"):
        load("train.jsonl", chat, SFT, PLAIN, truncate="split")


@pytest.mark.parametrize(
    ("how", "kept"),
    [("left", "<|bos|>ong and winded and[[ sat<|eos|>]]"), ("right", "<|bos|>a long and winded and[[ s]]")],
)
def test_cut_rows_are_counted(tmp_path, monkeypatch, chat, how, kept):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"prompt": "a long and winded and", "completion": " sat"}, {"prompt": "a", "completion": " sat"})
    size = 24
    data, report = load("train.jsonl", chat, SFT, PLAIN, max_length=size, truncate=how)
    assert report.truncated == 1 and report.kept == 2 and report.longest == size
    assert report.ended == (2 if how == "left" else 1)
    assert labelled(chat, data.rows([0])[0][:2]) == kept


def test_pieces_do_not_see_each_other():
    whole = Row(tuple(3 + i * 7 % 97 for i in range(40)), (1.0,) * 40)
    rows = [piece for (piece,) in fitted((whole,), 16, "split")]
    policy = Policy(tiny("llama"), Attachment(), Layout("shared"), head_of(tiny("llama"))).eval()
    with torch.no_grad():
        together = policy.tokens(build(rows)).logprob
        alone = torch.cat([policy.tokens(build([own])).logprob for own in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
