"""A run that was stopped or killed goes on as if it had not been: equal to the bit, whatever method and objective."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftctl import layout, report
from peftctl.data.batches import Batches
from peftctl.errors import InputError, Stopped
from peftctl.policy import Layout
from tests import runs
from tests.faults.processes import LONGEST

GPT2 = {"name": str(runs.CONFIGS / "models" / "tiny-gpt2.json")}  # its own dropout is 0.1
KEEP_ALL = {"keep": 9}


def _assert_equal(one: Path, other: Path) -> None:
    assert runs.untimed(one) == runs.untimed(other)
    assert runs.bits(one) == runs.bits(other)


def _in_pieces(output: Path, contents: dict[str, Any], cuts: tuple[int, ...] = (1, 2, 3, 4)) -> None:
    """Stopped after each of these steps, each time gone on with."""
    for number, cut in enumerate(cuts):
        with runs.stopped_after(cut, output), pytest.raises(Stopped, match=f"after step {cut} of 4"):
            runs.train(output, contents, resume=number > 0)
        assert runs.done(output) == cut
    runs.train(output, contents, resume=True)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
@pytest.mark.parametrize("method", runs.names())
def test_stopped_after_every_step_equals_never_stopped(method: str, objective: str, tmp_path: Path) -> None:
    contents = runs.document(method, objective, train={"save_every": 1, **KEEP_ALL})
    runs.train(tmp_path / "whole", contents)
    _in_pieces(tmp_path / "pieces", contents)
    _assert_equal(tmp_path / "whole", tmp_path / "pieces")


@pytest.mark.parametrize(
    "blocks",
    [
        {"method": {"dropout": 0.1}},
        {"model": GPT2, "method": {"target_modules": "all-linear"}},
        {"data": {"limit": 4, "validation": 0.25}},  # 3 examples, fewer than a step takes
        {"train": {"optimizer": "sgd"}},
        {"train": {"optimizer": "adafactor"}},
        {"train": {"gradient_checkpointing": True}, "method": {"dropout": 0.1}},
        {"train": {"max_steps": None, "epochs": 2}},  # the last step is smaller
        {"train": {"tokens_per_batch": 160}, "data": {"bucket": 2}, "method": {"dropout": 0.1}},
        {"model": {"layout": "padded"}, "data": {"bucket": 1}},
        {"method": {"init": "pissa", "lr_ratio": 4.0, "dropout": 0.1}},
        {"model": GPT2, "method": {"target_modules": ["c_attn.q", "c_attn.v"], "bias": "all"}},
    ],
    ids=["dropout", "gpt2", "few", "sgd", "adafactor", "recomputed", "epochs", "packed", "padded", "pissa", "parts"],
)
@pytest.mark.fault(2, 40)
def test_what_else_a_run_may_draw_on_is_kept(blocks: dict[str, Any], tmp_path: Path) -> None:
    contents = runs.document(**blocks)
    runs.train(tmp_path / "whole", contents)
    _in_pieces(tmp_path / "pieces", contents, cuts=(2, 3))
    assert runs.untimed(tmp_path / "whole") == runs.untimed(tmp_path / "pieces")
    last = "checkpoints/step-000004/optimizer.safetensors"
    for name in ("adapter/adapter_model.safetensors", last):
        assert runs.bits(tmp_path / "whole")[name] == runs.bits(tmp_path / "pieces")[name]


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
@pytest.mark.parametrize("micro_batch", [1, 4, 6])  # in the first step; between two micro-batches
@pytest.mark.fault(1, 2)
def test_killed_amid_accumulation_equals_never_killed(objective: str, micro_batch: int, tmp_path: Path) -> None:
    contents = runs.document("lora", objective, method={"dropout": 0.1}, train={"save_every": 1, **KEEP_ALL})
    runs.train(tmp_path / "whole", contents)
    with runs.killed_in(micro_batch), pytest.raises(runs.Killed):
        runs.train(tmp_path / "killed", contents)
    runs.train(tmp_path / "killed", contents, resume=True)
    _assert_equal(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("method", runs.names())
def test_preference_after_dialogues_starts_at_ln_2_and_keeps_its_reference(method: str, tmp_path: Path) -> None:
    first = runs.document(method)
    runs.train(tmp_path / "first", first)
    # the base of the first run, so that the adapter sits where it was trained
    more = {"model": {"name": str(tmp_path / "first" / "base")}, "method": {"init_from": str(tmp_path / "first")}}
    more["method"] |= runs.CONTINUED.get(method, {})
    contents = runs.document(method, "dpo", **more)
    runs.train(tmp_path / "whole", contents)
    first_loss, *_, last_loss = runs.losses(tmp_path / "whole")
    assert runs.even(first_loss) and not runs.even(last_loss)
    cut = tmp_path / "cut"
    with runs.stopped_after(2, cut), pytest.raises(Stopped):
        runs.train(cut, contents)
    held = load_file(cut / "checkpoints" / "step-000002" / "reference.safetensors")
    assert all(torch.is_tensor(value) for value in held.values())
    _spoil(tmp_path / "first" / "adapter" / "adapter_model.safetensors")  # the reference comes from the checkpoint
    runs.train(cut, contents, resume=True)
    assert runs.untimed(tmp_path / "whole") == runs.untimed(cut)
    whole, again = runs.adapter(tmp_path / "whole"), runs.adapter(cut)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def _spoil(path: Path) -> None:
    from safetensors.torch import save_file

    (path.parent / "manifest.json").unlink(missing_ok=True)
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


@pytest.mark.fault(7)
def test_a_finished_run_answers_without_touching_a_file(tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = runs.train(output, runs.document())
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in output.rglob("*")}
    assert runs.train(output, runs.document(), resume=True) == json.loads(json.dumps(result))
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in output.rglob("*")} == before


def test_a_finished_run_goes_on_when_more_is_asked(tmp_path: Path) -> None:
    output = tmp_path / "run"
    runs.train(output, runs.document())
    assert runs.train(output, runs.document(train={"max_steps": 6}), resume=True)["steps"] == 6
    assert runs.done(output) == 6


@pytest.mark.parametrize(
    ("blocks", "key"),
    [
        ({"method": {"rank": 2}}, "method.rank: 4 -> 2"),
        ({"data": {"limit": 8}}, "data.limit: 9 -> 8"),
        ({"train": {"seed": 1}}, "train.seed: 0 -> 1"),
        ({"train": {"batch_size": 1}}, "train.batch_size: 2 -> 1"),
        ({"train": {"gradient_accumulation": 4}}, "train.gradient_accumulation: 2 -> 4"),
        ({"data": {"bucket": 4}}, "data.bucket: None -> 4"),
    ],
)
@pytest.mark.fault(6)
def test_another_job_is_refused_by_the_key(blocks: dict[str, Any], key: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with runs.stopped_after(2, output), pytest.raises(Stopped):
        runs.train(output, runs.document())
    with pytest.raises(InputError, match=key):
        runs.train(output, runs.document(**blocks), resume=True)
    assert json.loads((output / "run.json").read_text())["status"] == "stopped"


@pytest.mark.fault(6, 39)
def test_other_data_or_another_base_are_refused(tmp_path: Path) -> None:
    output, data, base = tmp_path / "run", tmp_path / "rows.jsonl", tmp_path / "base"
    shutil.copy(runs.CONFIGS / "data" / "messages.jsonl", data)
    runs.train(tmp_path / "made", runs.document())
    shutil.copytree(tmp_path / "made" / "base", base)
    contents = runs.document(data={"train": str(data)}, model={"name": str(base)})
    with runs.stopped_after(2, output), pytest.raises(Stopped):
        runs.train(output, contents)
    _spoil(base / "model.safetensors")
    with pytest.raises(InputError, match="the base's content"):
        runs.train(output, contents, resume=True)
    data.write_text(data.read_text().replace("spider", "beetle"))
    with pytest.raises(InputError, match=r"the data's content\.train\.sha256"):
        runs.train(output, contents, resume=True)


def test_another_learning_rate_is_allowed(tmp_path: Path) -> None:
    output = tmp_path / "run"
    with runs.stopped_after(2, output), pytest.raises(Stopped):
        runs.train(output, runs.document())
    runs.train(output, runs.document(train={"learning_rate": 0.001}), resume=True)
    rates = [event["lr"] for event in runs.events(output) if event["event"] == "step"]
    assert rates[1] > 0.001 > rates[2]


@pytest.mark.fault(21)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = runs.document(train={"save_every": 1, **KEEP_ALL})
    runs.train(tmp_path / "whole", contents)
    output = tmp_path / "run"
    with runs.stopped_after(3, output), pytest.raises(Stopped):
        runs.train(output, contents)
    damaged = output / "checkpoints" / "step-000003" / "adapter.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    _loud(output, contents, resume=True)
    said = capsys.readouterr().err
    assert "step-000003 is skipped" in said and "going on from step 2" in said
    assert "removed step-000003: what comes after step 2 is done again" in said
    _assert_equal(tmp_path / "whole", output)


def _loud(output: Path, contents: dict[str, Any], **options: Any) -> None:
    from peftctl import run
    from peftctl.plan import Options

    run.train(runs.loaded(output, contents), Options(verify=False, **options))


def test_going_on_from_an_earlier_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = runs.document(train={"save_every": 1, **KEEP_ALL})
    runs.train(tmp_path / "whole", contents)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    _loud(tmp_path / "run", contents, resume_from=str(tmp_path / "run" / "checkpoints" / "step-000001"))
    assert "removed step-000002, step-000003, step-000004: what comes after step 1" in capsys.readouterr().err
    _assert_equal(tmp_path / "whole", tmp_path / "run")


def test_going_on_in_another_folder(tmp_path: Path) -> None:
    contents = runs.document(train={"save_every": 1, **KEEP_ALL})
    runs.train(tmp_path / "whole", contents)
    start = str(tmp_path / "whole" / "checkpoints" / "step-000002")
    runs.train(tmp_path / "branch", contents, resume_from=start)
    name = "adapter/adapter_model.safetensors"
    assert runs.bits(tmp_path / "whole")[name] == runs.bits(tmp_path / "branch")[name]
    with pytest.raises(InputError, match=r"method\.rank"):
        runs.train(tmp_path / "other", runs.document(method={"rank": 2}), resume_from=start)


@pytest.mark.fault(9)
def test_nothing_to_go_on_with(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no run in"):
        runs.train(tmp_path / "run", runs.document(), resume=True)


def test_the_moment_and_the_threads_are_those_of_the_start(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(runs.CONFIGS / "tokenizer", tokenizer)
    template = tokenizer / "chat_template.jinja"
    template.write_text("{{ strftime_now('%H:%M:%S.%f') }}" + template.read_text())
    contents = runs.document(model={"tokenizer": str(tokenizer)})
    output = tmp_path / "run"
    with runs.stopped_after(2, output), pytest.raises(Stopped):
        runs.train(output, contents)
    choices = json.loads((output / "run.json").read_text())["choices"]
    before = torch.get_num_threads()
    _change(output / "run.json", threads=before + 1, now="2001-02-03T04:05:06.000007")
    try:
        runs.train(output, contents, resume=True)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    again = json.loads((output / "run.json").read_text())["choices"]
    assert datetime.fromisoformat(choices["now"]).year > 2001
    assert again["now"] == "2001-02-03T04:05:06.000007" and again["threads"] == before + 1


def test_what_was_chosen_at_the_start_is_chosen_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine, or another moment, would choose otherwise: other layouts and kernels, other last bits."""
    contents = runs.document("lora", "dpo", method={"layers": [1]}, train={"save_every": 1, **KEEP_ALL})
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path / "cache"))
    runs.train(tmp_path / "whole", contents)
    output = tmp_path / "run"
    with runs.stopped_after(2, output), pytest.raises(Stopped):
        runs.train(output, contents)
    before = json.loads((output / "run.json").read_text())["choices"]
    assert before["frozen_blocks"] and before["remembered_reference"]
    assert before["layout"]["name"] == "shared" and before["device"] == "cpu"
    for owner, name, answer in ((layout, "choose", Layout("padded")), (Batches, "passes", 0.5)):
        monkeypatch.setattr(owner, name, lambda *_, answer=answer: answer)
    runs.train(output, contents, resume=True)
    assert json.loads((output / "run.json").read_text())["choices"] == before
    _assert_equal(tmp_path / "whole", output)


def _change(path: Path, **choices: Any) -> None:
    held = json.loads(path.read_text())
    held["choices"] |= choices
    path.write_text(json.dumps(held))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.fault(10)
def test_a_signal_leaves_a_checkpoint_to_go_on_from(number: int, code: int, tmp_path: Path) -> None:
    output = tmp_path / "run"
    contents = runs.document(train={"max_steps": 3000, "eval_every": None})
    path = runs.written(output, contents)
    command = [sys.executable, "-m", "peftctl.cli", "train", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(runs.CONFIGS.parent)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + LONGEST
    while runs.done(output) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=LONGEST)
    assert process.returncode == code, said
    assert "--resume goes on from there" in said.splitlines()[-1]
    assert not (output / "lock").exists()
    steps = runs.done(output)
    assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step-{steps:06d}"]
    assert len(report.read(output / "metrics.jsonl")) == steps
    result = runs.train(output, runs.document(train={"max_steps": steps + 2, "eval_every": None}), resume=True)
    assert result["steps"] == steps + 2
