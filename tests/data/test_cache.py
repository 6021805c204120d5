"""What was encoded once comes back equal, and only for the very same question."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path

import pytest

from peftctl.data import cache, dataset
from peftctl.data.chat import Chat
from peftctl.data.dataset import load
from peftctl.data.packed import Packed
from peftctl.data.sources import files
from peftctl.errors import DataError
from peftctl.objectives import get
from tests.data.conftest import TEMPLATES

SFT, DPO = get("sft"), get("dpo")
PLAIN, PAIRS = SFT.config(name="sft"), DPO.config(name="dpo")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "SMALL", 0)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, DIALOGUES)))
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, COMPARED)))
    return tmp_path


def talk(*turns: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


DIALOGUES = [talk("the cat?", "sat"), talk("only a question"), {**talk("a", "b", "dög \U0001f436", "log"), "id": 3}]
COMPARED = [
    {"prompt": [{"role": "user", "content": "q"}], "chosen": f"{i}", "rejected": "no " * (i + 1)} for i in range(3)
]


def entries() -> list[Path]:
    return sorted(Path("cache/tokens").iterdir()) if Path("cache/tokens").is_dir() else []


def skipping(chat, name="rows.jsonl", **options):
    return load(name, chat, SFT, PLAIN, on_bad_row="skip", **options)


def forbid_encoding(monkeypatch) -> None:
    def encoded(*args, **options):
        raise AssertionError("encoded again")

    monkeypatch.setattr(dataset, "_encoded", encoded)


def test_all_of_it_comes_back(chat, monkeypatch):
    first, pairs = skipping(chat), load("pairs.jsonl", chat, DPO, PAIRS)
    assert len(first[1].faults) == 1 and first[1].unused == ("id",) and len(entries()) == 2
    forbid_encoding(monkeypatch)
    assert skipping(chat) == first and load("pairs.jsonl", chat, DPO, PAIRS) == pairs
    for again, before in zip(skipping(chat), first, strict=True):
        assert repr(again) == repr(before)  # the very types, too: a list is no tuple


def test_weights_of_any_kind_come_back(chat):
    rows, _ = skipping(chat)
    odd = tuple(
        tuple(row._replace(weights=tuple(w * (0.1 + i) for i, w in enumerate(row.weights))) for row in own)
        for own in rows.examples
    )
    packed, content = Packed(), b""
    for number, own in enumerate(odd):
        content += packed.add(own, number)
    assert packed.examples(lambda start, end: content[start:end]) == odd


def test_everything_that_matters_is_asked_for(chat, made, here):
    keys = []

    def note(path="rows.jsonl", chat=chat, objective=SFT, config=PLAIN, **options):
        plain = {
            "format": "auto",
            "columns": None,
            "max_length": 9,
            "truncate": "refuse",
            "on_bad_row": "skip",
            "limit": None,
        }
        values = tuple((plain | {"truncate": "refuse", "vocabulary": None} | options).values())
        keys.append(cache.key(files(path), chat.fingerprint, objective, config, values))

    note()
    note(chat=Chat(made("chatml", merges=False)))
    note(chat=Chat(chat.folder, (TEMPLATES / "zephyr.jinja").read_text()))
    note(config=SFT.config(name="sft", trained="last"))
    note(objective=DPO, config=PAIRS)
    note(format="messages")
    note(columns={"messages": "messages"})
    note(max_length=8)
    note(on_bad_row="error")
    note(truncate="left")
    note(limit=2)
    note(vocabulary=100)
    (here / "other.jsonl").write_bytes((here / "rows.jsonl").read_bytes())
    note("other.jsonl")  # places name the file
    (here / "rows.jsonl").write_text(json.dumps(talk("the cat?", "sat down")))
    note()
    assert len(set(keys)) == len(keys) == 14 and None not in keys
    note()
    assert keys[-1] == keys[-2]


def test_the_time_matters_where_the_template_asks_for_it(chat):
    moments = datetime(2001, 2, 3), datetime(2002, 2, 3)
    silent = {Chat(chat.folder, now=moment).fingerprint() for moment in moments}
    template = "{{ strftime_now('%Y') }}" + (TEMPLATES / "chatml.jinja").read_text()
    asking = [Chat(chat.folder, template, now=moment) for moment in moments]
    assert len(silent) == 1 and asking[0].fingerprint() != asking[1].fingerprint()
    one, other = (skipping(chat)[0].examples for chat in asking)
    assert one != other and len(entries()) == 2


@pytest.mark.parametrize("place", [0, 40, 200, -1])
@pytest.mark.fault(39)
def test_a_damaged_entry_is_made_anew(place, chat):
    first = repr(skipping(chat))  # read now: the entry is about to be damaged
    [entry] = entries()
    whole = entry.read_bytes()
    broken = bytearray(whole)
    broken[place] ^= 1
    for damaged in (bytes(broken), whole[: len(whole) // 2], b"", whole + b"\0"):
        entry.write_bytes(damaged)
        assert repr(skipping(chat)) == first and entry.read_bytes() == whole


def test_refusals_are_not_kept(chat):
    for _ in range(2):
        with pytest.raises(DataError, match="1 of 3 rows cannot be used"):
            load("rows.jsonl", chat, SFT, PLAIN)
    with pytest.raises(DataError, match="does not exist"):
        load("nowhere.jsonl", chat, SFT, PLAIN)
    assert not entries()


def test_small_files_are_not_kept(chat, monkeypatch):
    monkeypatch.setattr(cache, "SMALL", os.path.getsize("rows.jsonl") + 1)
    skipping(chat)
    assert not entries()


def test_a_cache_that_cannot_be_written_is_done_without(chat, here):
    first = skipping(chat)
    entries()[0].unlink()
    Path("cache/tokens").rmdir()
    Path("cache/tokens").write_text("no folder")
    assert skipping(chat) == first


def test_a_file_that_changes_meanwhile_is_not_kept(chat, monkeypatch):
    encoded = dataset._encoded

    def changed(*args):
        Path("rows.jsonl").write_text(json.dumps(talk("the cat?", "sat down")))
        return encoded(*args)

    monkeypatch.setattr(dataset, "_encoded", changed)
    skipping(chat)
    assert not entries()


def test_what_was_not_used_for_longest_goes(chat, monkeypatch):
    for limit in (1, 2, 3):
        skipping(chat, limit=limit)
        for path in entries():
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 10))
    oldest, second, third = sorted(entries(), key=lambda path: path.stat().st_mtime)
    skipping(chat, limit=1)  # used again
    monkeypatch.setattr(cache, "LARGEST", 2 * third.stat().st_size + 100)
    skipping(chat, limit=4)
    assert oldest in entries() and second not in entries() and third not in entries()
    monkeypatch.setattr(cache, "LARGEST", 0)
    skipping(chat, limit=5)
    assert len(entries()) == 1
