"""Rows encoded in several processes are those that one process encodes, whatever becomes of the others."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest

from peftctl import waiting
from peftctl.data import parallel, reading
from peftctl.data.dataset import load
from peftctl.data.encoded import Dataset
from peftctl.data.encoding import chunk_of, encode
from peftctl.objectives import get
from peftctl.row import Row

SFT, DPO = get("sft"), get("dpo")
PLAIN, PAIRS = SFT.config(name="sft"), DPO.config(name="dpo")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reading, "ROWS", 16)
    return tmp_path


def write(count: int, name: str = "rows.jsonl") -> None:
    mixed = random.Random(0)
    with open(name, "w") as file:
        for number in range(count):
            words = " ".join(mixed.choice(["cat", "dog", "sat", "dög"]) for _ in range(mixed.randrange(1, 9)))
            row = {"prompt": f"the {words}?", "chosen": f"a{number}", "rejected": words, "id": number}
            file.write("{" if number % 37 == 5 else json.dumps(row))
            file.write("\n")


def together(monkeypatch) -> list[parallel.Worker]:
    """From now on every row but the first batch's goes to other processes."""
    monkeypatch.setattr(parallel, "SECONDS", -1.0)
    monkeypatch.setattr(parallel, "processors", lambda: 2)
    monkeypatch.setattr(reading, "LONG", -1e9)
    started = []
    begin = parallel.Worker.__init__

    def noted(self, document):
        begin(self, document)
        started.append(self)

    monkeypatch.setattr(parallel.Worker, "__init__", noted)
    return started


def loaded(chat):
    data, report = load("rows.jsonl", chat, DPO, PAIRS, on_bad_row="skip")
    return Dataset(data.name, tuple(data.examples), tuple(data.places), data.fingerprint), report


def test_several_processes_answer_as_one(chat, monkeypatch):
    write(200)
    alone = loaded(chat)
    workers = together(monkeypatch)
    assert loaded(chat) == alone and alone[1].refused == 6 and alone[1].unused == ("id",)
    assert len(workers) == 2 and all(worker.process is None for worker in workers)  # ended


def test_a_process_that_dies_is_done_without(chat, monkeypatch):
    write(200)
    alone = loaded(chat)
    workers = together(monkeypatch)
    ask = parallel.Worker.ask

    def dying(self, batch):
        if self is workers[0] and self.process is not None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()
        return ask(self, batch)

    monkeypatch.setattr(parallel.Worker, "ask", dying)
    assert loaded(chat) == alone
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    assert loaded(chat) == alone


def test_what_another_process_is_told_is_enough(chat, monkeypatch):
    write(20)
    jobs = []
    monkeypatch.setattr(
        "peftctl.data.gathering.chunks", lambda job, *more: jobs.append(job) or parallel.chunks(job, *more)
    )
    loaded(chat)
    from peftctl.data.encoding import given_of, job_of, message
    from peftctl.data.sources import Cells

    told = job_of(json.loads(json.dumps(jobs[0].document())))
    rows = [(3, Cells(prompt="a", chosen="b", rejected="c")), (4, "no row"), (5, {"prompt": "a"})]
    own, theirs = encode(jobs[0], rows), encode(told, given_of(message(rows)))
    assert own.dump() == theirs.dump() == chunk_of(own.dump()).dump() and own.faults[0] == (4, "no row")
    assert type(given_of(message(rows))[0][1]) is Cells


def test_long_work_is_shown_and_short_work_is_not(chat, monkeypatch):
    write(400)
    shown = io.StringIO()
    monkeypatch.setattr(waiting, "AFTER", 1e9)
    with waiting.tokenising(stream=shown) as progress:
        load("rows.jsonl", chat, DPO, PAIRS, on_bad_row="skip", progress=progress)
    assert shown.getvalue() == ""
    monkeypatch.setattr(waiting, "AFTER", 0.0)
    with waiting.tokenising(stream=shown) as progress:
        load("rows.jsonl", chat, DPO, PAIRS, on_bad_row="skip", progress=progress, limit=300)
    first, *_, last = shown.getvalue().splitlines()
    assert first == "tokenising rows.jsonl: 16 of about 300 rows"
    assert last.startswith("tokenised rows.jsonl: 300 rows in ")
    quiet = io.StringIO()
    with waiting.tokenising(quiet=True, stream=quiet) as progress:
        progress("rows", 1, 2)
    assert quiet.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(waiting, "AFTER", 0.0)
    screen = Terminal()
    with waiting.tokenising(stream=screen) as progress:
        for done in (1, 5, 10):
            progress("rows.jsonl", done, 10)
    assert "tokenising rows.jsonl" in screen.getvalue()


def test_rows_are_not_held_in_memory(chat, monkeypatch):
    """More rows take some bytes each, for the tables, and not those of their tokens."""
    row = Row((7,) * 200, (1.0,) * 200)
    quick = SimpleNamespace(**{**vars(SFT), "encode": lambda example, encoder, config: (row,)})

    def peak(count: int) -> int:
        Path("rows.jsonl").write_text(f'{{"prompt": "{"sat " * 150}", "completion": " on"}}\n' * count)
        tracemalloc.start()
        data, _ = load("rows.jsonl", chat, quick, PLAIN)
        assert len(data) == count and data.rows([count - 1]) == [row._replace(example=count - 1)]
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    monkeypatch.setattr(reading, "HEAD", 64)
    few, many = peak(2000), peak(8000)
    assert (many - few) / 6000 < 100  # bytes a row; the tokens alone would take 1,000
