"""Every row of a file is kept or refused aloud; what is kept is what the objective learns from."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

from peftctl.data.chat import Chat
from peftctl.data.dataset import load, prepare
from peftctl.errors import DataError
from peftctl.objectives import get
from peftctl.row import Message

SFT, DPO, KTO = get("sft"), get("dpo"), get("kto")
PLAIN, PAIRS, JUDGED = SFT.config(name="sft"), DPO.config(name="dpo"), KTO.config(name="kto")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def talk(*turns: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


def pair(prompt: str, chosen: str, rejected: str) -> dict:
    return {"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected}


def write(here, *rows: object, name: str = "train.jsonl"):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (here / name).write_text("\n".join(lines))
    return here / name


def recipe(objective=PLAIN, seed=0, **data):
    fields = {
        "train": "train.jsonl",
        "validation": None,
        "max_length": 200,
        "truncate": "refuse",
        "format": "auto",
        "columns": None,
    }
    fields |= {
        "truncate": "refuse",
        "on_bad_row": "error",
        "share_starts": True,
        "streaming": False,
        "limit": None,
        **data,
    }
    return SimpleNamespace(data=SimpleNamespace(**fields), objective=objective, train=SimpleNamespace(seed=seed))


def test_rows_in_labelled_text_out(here, chat):
    write(here, talk("the cat?", "sat"), {**talk("a", "b", "c", "on the log"), "id": 3})
    data, report = load("train.jsonl", chat, SFT, PLAIN)
    learnt = [
        chat.decode([i for i, w in zip(row.ids, row.weights, strict=True) if w], special=True)
        for row in data.rows([0, 1])
    ]
    assert learnt == ["sat<|im_end|>", "b<|im_end|>on the log<|im_end|>"]
    assert [row.example for row in data.rows([0, 1])] == [0, 1] and data.places == ("train.jsonl:1", "train.jsonl:2")
    assert (report.kind, report.read, report.kept, report.refused) == ("messages", 2, 2, 0)
    assert report.unused == ("id",) and report.ended == 2 and report.unlabelled == 0
    rows = data.rows([0, 1])
    assert report.tokens == sum(len(row.ids) for row in rows) and report.longest == len(rows[1].ids)
    assert report.labelled_tokens == sum(map(sum, (row.weights for row in rows)))


def test_a_pair_shares_its_prompt(here, chat):
    write(here, pair("the cat?", "sat on the mat", "sat on the log"))
    data, report = load("train.jsonl", chat, DPO, PAIRS)
    chosen, rejected = data.rows([0])
    prompt = chat.render_prompt([Message("user", "the cat?")])
    assert (chosen.role, rejected.role, chosen.example, rejected.example) == ("chosen", "rejected", 0, 0)
    assert chosen.ids[: len(prompt)] == rejected.ids[: len(prompt)] == prompt
    assert not any(chosen.weights[: len(prompt)]) and report.ended == 2
    write(here, {"prompt": "the cat", "chosen": " sat", "rejected": " sat on"}, name="plain.jsonl")
    chosen, rejected = load("plain.jsonl", chat, DPO, PAIRS)[0].rows([0])
    assert chat.decode(rejected.ids, special=True) == "the cat sat on<|eos|>"


BAD = ["{", talk("only a question"), talk("q", "long " * 90), talk("q", "ok"), talk("q", "")]
REASONS = {1: "invalid JSON", 2: "no assistant turn", 3: "more than data.max_length 200", 5: "content is empty"}


@pytest.mark.fault(37)
def test_every_bad_row_is_named_in_one_go(here, chat):
    write(here, *BAD)
    with pytest.raises(DataError) as caught:
        prepare(recipe(), chat, SFT)
    *lines, last = str(caught.value).split("\n")
    assert last == "train.jsonl: 4 of 5 rows cannot be used; data.on_bad_row: skip leaves them out"
    assert [line.split(": ")[0] for line in lines] == [f"train.jsonl:{number}" for number in REASONS]
    assert all(reason in line for line, reason in zip(lines, REASONS.values(), strict=True))


@pytest.mark.fault(37)
def test_skipped_rows_are_counted(here, chat):
    write(here, *BAD)
    prepared = prepare(recipe(on_bad_row="skip"), chat, SFT)
    assert (prepared.report.read, prepared.report.kept, prepared.report.refused) == (5, 1, 4)
    assert prepared.train.places == ("train.jsonl:4",)
    assert [fault.place for fault in prepared.report.faults] == [f"train.jsonl:{number}" for number in REASONS]


def test_ten_are_listed(here, chat):
    write(here, *[talk("q")] * 12, talk("q", "a"))
    with pytest.raises(DataError, match=r"\.\.\. and 2 more\ntrain.jsonl: 12 of 13 rows"):
        prepare(recipe(), chat, SFT)
    report = prepare(recipe(on_bad_row="skip"), chat, SFT).report
    assert len(report.faults) == 10 and report.refused == 12


@pytest.mark.fault(37)
def test_nothing_kept_is_refused_even_when_skipping(here, chat):
    write(here, *BAD[:3])
    with pytest.raises(DataError, match=r"train.jsonl: no row can be used$"):
        prepare(recipe(on_bad_row="skip"), chat, SFT)
    write(here, "{", "}")
    with pytest.raises(DataError, match="no row can be used"):
        prepare(recipe(), chat, DPO)


def test_the_wrong_kind_of_data_is_one_line(here, chat):
    write(here, talk("q", "a"))
    with pytest.raises(DataError) as caught:
        load("train.jsonl", chat, DPO, PAIRS)
    assert str(caught.value) == (
        "train.jsonl has messages; objective dpo learns from preference pairs (prompt, chosen, rejected)"
    )
    write(here, pair("q", "a", "b"))
    with pytest.raises(
        DataError, match=r"has preference pairs .*; objective sft learns from prompts with .* or messages"
    ):
        load("train.jsonl", chat, SFT, PLAIN)


@pytest.mark.fault(38)
def test_ids_beyond_the_vocabulary_are_refused(here, chat):
    write(here, talk("q", "a"))
    assert load("train.jsonl", chat, SFT, PLAIN, vocabulary=chat.vocabulary)[1].kept == 1
    with pytest.raises(DataError, match=r"train.jsonl:1: the tokenizer gives id \d+ \('.*'\), but the base knows ids"):
        load("train.jsonl", chat, SFT, PLAIN, vocabulary=20)


@pytest.mark.fault(37)
def test_a_row_of_which_nothing_is_learnt_is_refused(here, chat):
    write(here, talk("q", "a"), talk("q", "b"))
    objective = SimpleNamespace(**{**vars(SFT), "encode": unlabelled_first(SFT.encode)})
    with pytest.raises(DataError, match=r"train.jsonl:1: no token of the row would be learnt"):
        load("train.jsonl", chat, objective, PLAIN)
    report = load("train.jsonl", chat, objective, PLAIN, on_bad_row="skip")[1]
    assert (report.unlabelled, report.refused, report.kept) == (1, 1, 1)


def unlabelled_first(encode):
    def wrapped(example, encoder, config):
        rows = encode(example, encoder, config)
        # a weight on the first token alone is none: nothing predicts it
        empty = tuple(row._replace(weights=(1.0, *(0.0,) * (len(row.ids) - 1))) for row in rows)
        return empty if example.messages[1].content == "a" else rows

    return wrapped


def test_a_fraction_is_held_out_by_the_seed_alone(here, chat):
    write(here, *[talk("q", f"answer {i}") for i in range(20)])
    first, again, other = (prepare(recipe(validation=0.25, seed=seed), chat, SFT) for seed in (0, 0, 1))
    assert (len(first.train), len(first.validation), first.report.kept) == (15, 5, 20)
    assert first.validation == again.validation and first.validation.places != other.validation.places
    assert not set(first.train.places) & set(first.validation.places)
    assert [rows[0].example for rows in first.validation.examples] == list(range(5))
    write(here, talk("q", "a"))
    with pytest.raises(DataError, match="one row, of which none can be held out"):
        prepare(recipe(validation=0.5), chat, SFT)


def test_a_held_out_file_and_a_limit(here, chat):
    write(here, *[talk("q", f"answer {i}") for i in range(9)])
    write(here, talk("q", "held"), talk("q", "out"), name="held.jsonl")
    prepared = prepare(recipe(validation="held.jsonl", limit=4), chat, SFT)
    assert (len(prepared.train), len(prepared.validation)) == (4, 2)
    assert prepared.validation_report.name == "held.jsonl" and prepared.validation.places[0] == "held.jsonl:1"


def test_sizes_count_a_pairs_rows_together(here, chat):
    write(here, pair("q", "a", "a longer answer"))
    data, report = load("train.jsonl", chat, DPO, PAIRS)
    assert list(data.sizes()) == [report.tokens] and list(data.sizes(padded=True)) == [2 * report.longest]


def test_pairs_of_the_same_tokens_and_prompts_without_room_are_refused(here, chat):
    rows = [pair("q", "a", "a "), pair("long " * 80, "a", "b"), pair("q", "a", "b")]
    write(here, rows[0], rows[1], rows[2])
    stripping = Chat(
        chat.folder, template=chat.template.source.replace("message['content']", "message['content'] | trim")
    )
    with pytest.raises(DataError) as caught:
        load("train.jsonl", stripping, DPO, PAIRS, max_length=60)
    same, room, total = str(caught.value).split("\n")
    assert same == "train.jsonl:1: chosen and rejected are the same tokens; a pair must differ"
    assert re.fullmatch(r"train.jsonl:2: the prompt alone has \d+ tokens, and data.max_length 60 leaves .*", room)
    assert total.startswith("train.jsonl: 2 of 3 rows cannot be used")


def test_pairs_that_are_none_are_named_by_their_rows(here, chat):
    asked, good, bad, other = (
        {"role": role, "content": text}
        for role, text in (("user", "the cat?"), ("assistant", "sat"), ("assistant", "log"), ("user", "the dog?"))
    )
    write(
        here,
        pair("the cat?", "sat", "log"),
        pair("the cat?", "sat", "sat"),
        pair("the cat?", "sat", " "),
        {"chosen": [asked, good], "rejected": [other, bad]},
        {"chosen": [asked, good, other, good], "rejected": [asked, good]},
        {"chosen": [asked, good, asked, bad], "rejected": [asked, good, other, bad]},
    )
    with pytest.raises(DataError) as caught:
        load("train.jsonl", chat, DPO, PAIRS)
    told = [line.partition(": ")[::2] for line in str(caught.value).split("\n")]
    assert [place for place, _ in told] == [*(f"train.jsonl:{n}" for n in range(2, 7)), "train.jsonl"]
    said = ("chosen equals rejected", "rejected is empty", "no common prompt", "rejected is empty:", "where chosen and")
    for reason, (_, line) in zip(said, told, strict=False):
        assert reason in line


def judged(prompt: str, answer: str, label: bool) -> dict:
    return {"prompt": [{"role": "user", "content": prompt}], "completion": answer, "label": label}


def test_judged_answers_get_anothers_within_their_own_side_of_the_split(here, chat):
    write(here, *[judged(f"question {i}", f"answer {i} " * (1 + i % 3), i % 2 == 0) for i in range(12)])
    first, again, other = (prepare(recipe(JUDGED, seed=seed, validation=0.25), chat, KTO) for seed in (0, 0, 1))
    assert first == again and first.train != other.train
    assert (len(first.train), len(first.validation)) == (9, 3)
    for data in (first.train, first.validation):
        answers = {learnt(chat, own) for own, _ in data.examples}
        for index, (own, mismatched) in enumerate(data.examples):
            assert own.role in ("desirable", "undesirable") and mismatched.role == "mismatched"
            assert own.example == mismatched.example == index
            assert any(answer.startswith(learnt(chat, mismatched)) for answer in answers)
            assert learnt(chat, mismatched) != learnt(chat, own)
            assert len(mismatched.ids) <= max(
                len(rows[0].ids) for rows in first.train.examples + first.validation.examples
            )


def test_the_seed_deals_the_answers_out(here, chat):
    write(here, *[judged(f"question {i}", f"answer {i}", True) for i in range(12)])
    dealt = [prepare(recipe(JUDGED, seed=seed), chat, KTO).train.examples for seed in (0, 1)]
    one, other = ([[rows[k] for rows in examples] for k in (0, 1)] for examples in dealt)
    assert one[0] == other[0] and one[1] != other[1]


def learnt(chat, row) -> str:
    return chat.decode([i for i, w in zip(row.ids, row.weights, strict=True) if w], special=True)


def test_one_judged_answer_alone_is_refused(here, chat):
    write(here, *[judged("q", f"answer {i}", True) for i in range(3)])
    with pytest.raises(DataError, match=r"^train\.jsonl, its held-out rows: one row alone is not enough"):
        prepare(recipe(JUDGED, validation=0.1), chat, KTO)
