"""Several processes give what one gives, end together, and go on in other numbers."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftctl import cli, distributed
from peftctl.data.batches import each_once
from peftctl.distributed import World, joined
from peftctl.errors import InputError, TrainingError
from peftctl.gathered import gathered
from peftctl.launch import free_port, launch
from peftctl.objectives.base import Loss, Term
from peftctl.policy import Policy
from peftctl.trainer import Question
from tests import runs
from tests.faults.processes import LONGEST, begun, ended


def ranks(count: int, work: Callable[[int], Any]) -> list[int]:
    """Fork so many processes of one world, each doing `work` for its rank; their process numbers."""
    port = str(free_port())

    def member(rank: int) -> Any:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return work(rank)

    return [begun(lambda rank=rank: member(rank)) for rank in range(count)]


def trained(path: Path, *words: str, count: int = 2) -> list[int]:
    """The exit codes of processes that train a recipe together."""
    command = ["train", str(path), "--quiet", "--no-verify", *words]
    return [ended(child) for child in ranks(count, lambda rank: cli.main(command))]


@pytest.mark.fault(45)
@pytest.mark.parametrize(
    "method, objective, blocks",
    [
        ("lora", "sft", {}),
        pytest.param("adalora", "dpo", {}, marks=pytest.mark.slow),
        pytest.param("prefix", "kto", {}, marks=pytest.mark.slow),
        pytest.param(
            "lora", "grpo", {"objective": {"iterations": 2}}, marks=pytest.mark.slow
        ),  # who also answer for both
        pytest.param(
            "lora",
            "sft",
            {"data": {"limit": 1, "validation": None}, "train": {"batch_size": 1, "eval_every": None}},
            marks=pytest.mark.fault(40),
        ),
    ],
)
def test_two_processes_give_the_bits_of_one(
    method: str, objective: str, blocks: dict[str, Any], tmp_path: Path
) -> None:
    """Of two micro-batches each computes one; in the last case the second has nothing to do."""
    contents = runs.document(method, objective, **blocks)
    runs.train(tmp_path / "one", contents)
    assert trained(runs.written(tmp_path / "two", contents)) == [0, 0]
    assert weights(tmp_path / "two") == weights(tmp_path / "one")
    assert runs.untimed(tmp_path / "two") == runs.untimed(tmp_path / "one")


BEST = {"max_steps": 12, "learning_rate": 0.2, "eval_every": 1, "schedule": "constant", "warmup": 0}
BEST |= {"early_stopping": 2, "keep_best": True}
MIXTURE = {"name": str(runs.CONFIGS / "models" / "tiny-mixtral.json")}
# what each says about all: when to end, how good a head is, how evenly experts are used
TOLD: dict[str, tuple[str, str, dict[str, Any]]] = {
    "early stopping": ("lora", "sft", {"train": BEST}),
    "f1": (
        "lora",
        "classification",
        {
            "model": {"task": "sequence-classification"},
            "train": BEST | {"best_by": "f1_macro", "early_stopping": 4},
            "data": {"validation": 0.5, "limit": None},
        },
    ),
    "router loss": (
        "lora",
        "sft",
        {
            "model": MIXTURE,
            "method": {"target_modules": ["o_proj", "experts.down_proj"]},
            "train": {"router_loss": 0.1, "max_steps": 2},
        },
    ),
}


@pytest.mark.fault(45)
@pytest.mark.parametrize("kind", TOLD)
def test_what_is_measured_over_all_is_that_of_one(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out rows come in several micro-batches, of which each process has some."""
    method, objective, blocks = TOLD[kind]
    contents = runs.document(method, objective, **blocks)
    monkeypatch.setattr(each_once, "__defaults__", (*each_once.__defaults__[:-1], 60))
    one = runs.train(tmp_path / "one", contents)
    assert trained(runs.written(tmp_path / "two", contents)) == [0, 0]
    two = json.loads((tmp_path / "two" / "run.json").read_text())["result"]
    assert (two["steps"], two.get("best")) == (one["steps"], one.get("best"))
    assert runs.untimed(tmp_path / "two") == runs.untimed(tmp_path / "one")
    assert weights(tmp_path / "two") == weights(tmp_path / "one")
    last = runs.untimed(tmp_path / "one")[-2:]
    if kind == "early stopping":
        assert one["best"]["step"] < one["steps"] < BEST["max_steps"]
    else:
        name = "validation_f1_macro" if kind == "f1" else "router_loss"
        assert any(name in event for event in last)


def test_losses_are_told_in_the_order_of_the_micro_batches(tmp_path: Path) -> None:
    """Sums depend on it in their last digit, so that of eight micro-batches over two processes is told as by one."""

    class Two(World):
        def gather(self, document: Any) -> list[Any]:
            return [[own for own in document if own[0] % 2 == rank] for rank in (0, 1)]

    losses = {place: Loss((Term(torch.tensor(float(place))),), {}) for place in range(8)}
    assert [one.terms[0][1] for one in gathered(losses, Two(0, 2))] == list(range(8))

    contents = runs.document(train={"max_steps": 1, "batch_size": 1, "gradient_accumulation": 8, "eval_every": None})
    runs.train(tmp_path / "one", contents)
    assert trained(runs.written(tmp_path / "two", contents)) == [0, 0]
    (one, *_), (two, *_) = (runs.untimed(tmp_path / name) for name in ("one", "two"))
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)  # of gradients added in another order
    assert two | {"grad_norm": 0} == one | {"grad_norm": 0}


def weights(output: Path) -> dict[str, bytes]:
    """Adapter and optimizer; the generators differ, for each of several processes has its own."""
    return {name: found for name, found in runs.bits(output).items() if "rng" not in name}


def losses(path: Path) -> list[float]:
    return [event["loss"] for event in runs.untimed(path) if event["event"] == "step"]


@pytest.mark.fault(4)
@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (2, 3)])
def test_another_number_of_processes_goes_on_with_the_same_examples(before: int, after: int, tmp_path: Path) -> None:
    """Micro-batches of one example, cut otherwise in between: losses differ in their last digits at most."""
    contents = runs.document(train={"batch_size": 1, "gradient_accumulation": 4})
    runs.train(tmp_path / "whole", contents)
    output = tmp_path / "run"
    path = runs.written(output, contents)
    with runs.stopped_after(2, output):
        assert trained(path, count=before) == [143] * before
    assert trained(path, "--resume", count=after) == [0] * after
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_a_step_is_cut_for_every_process(tmp_path: Path) -> None:
    """One micro-batch of four by one process, two of two by two."""
    contents = runs.document(train={"batch_size": 4, "gradient_accumulation": 1})
    runs.train(tmp_path / "one", contents)
    assert trained(runs.written(tmp_path / "two", contents)) == [0, 0]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.fault(13)
@pytest.mark.parametrize("asked", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_stops_all_at_one_step(asked: int, tmp_path: Path) -> None:
    """Each process draws a dropout of its own, and after a stop the same again."""
    contents = runs.document(train={"save_every": 2})
    contents["method"]["dropout"] = 0.3
    assert trained(runs.written(tmp_path / "whole", contents)) == [0, 0]
    output = tmp_path / "run"
    command = ["train", str(runs.written(output, contents)), "--quiet", "--no-verify"]

    def member(rank: int) -> None:
        with runs.stopped_after(2 if rank == asked else 9, output):
            cli.main(command)

    assert [ended(child) for child in ranks(2, member)] == [143, 143]
    assert runs.done(output) == 2
    assert trained(runs.written(output, contents), "--resume") == [0, 0]
    assert runs.bits(output) == runs.bits(tmp_path / "whole")
    assert runs.untimed(output) == runs.untimed(tmp_path / "whole")


@pytest.mark.fault(12)
@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_when_one_is_killed_the_others_end_and_the_run_goes_on(killed: int, tmp_path: Path) -> None:
    contents = runs.document(train={"save_every": 1})
    runs.train(tmp_path / "whole", contents)
    output = tmp_path / "run"
    command = ["train", str(runs.written(output, contents)), "--quiet", "--no-verify"]
    loss = Question.loss

    def dying(self: Question, batch: Any) -> Any:
        if runs.done(output) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(self, batch)

    def member(rank: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if rank == killed:
                patch.setattr(Question, "loss", dying)
            cli.main(command)

    begin = time.monotonic()
    codes = [ended(child) for child in ranks(2, member)]
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] == 1
    assert time.monotonic() - begin < distributed.ANSWER / 10, "one waited for the other's answer"
    assert trained(runs.written(output, contents), "--resume", count=1) == [0]
    assert weights(output) == weights(tmp_path / "whole")


@pytest.mark.fault(41)
def test_nan_in_one_process_stops_all_before_the_update(tmp_path: Path) -> None:
    contents = runs.document(train={"save_every": 1})
    output = tmp_path / "run"
    command = ["train", str(runs.written(output, contents)), "--quiet", "--no-verify"]
    tokens = Policy.tokens

    def broken(self: Policy, batch: Any) -> Any:
        found = tokens(self, batch)
        return found._replace(logprob=found.logprob * torch.nan) if runs.done(output) == 2 else found

    def member(rank: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(Policy, "tokens", broken)
            cli.main(command)

    assert [ended(child) for child in ranks(2, member)] == [1, 1]
    assert runs.events(output)[-1]["event"] == "failure"
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


@pytest.mark.fault(14)
@pytest.mark.parametrize("rank, size, port, kind", [("1", "2", "9", TrainingError), ("2", "2", "9", InputError)])
def test_who_finds_no_other_says_so(
    rank: str, size: str, port: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    begin = time.monotonic()
    with pytest.raises(kind, match=r"MASTER_PORT|torchrun"), joined(1.0):
        pass
    assert time.monotonic() - begin < distributed.MEETING


def test_gradients_are_added_and_nobody_s_stay_none(tmp_path: Path) -> None:
    def member(rank: int) -> None:
        with joined() as world:
            parameters = {name: nn.Parameter(torch.zeros(2)) for name in ("both", "one", "none")}
            parameters["both"].grad = torch.tensor([1.0, 2.0]) * (rank + 1)
            if rank == 1:
                parameters["one"].grad = torch.tensor([3.0, 4.0])
            world.add_gradients(parameters)
            grads = [None if p.grad is None else p.grad.tolist() for p in parameters.values()]
            told = [grads, world.gather(float("inf")), world.first(None), world.first(rank or None)]
            (tmp_path / str(rank)).write_text(json.dumps(told))

    assert [ended(child) for child in ranks(2, member)] == [0, 0]
    for rank in "01":
        told = json.loads((tmp_path / rank).read_text())
        assert told == [[[3.0, 6.0], [3.0, 4.0], None], [float("inf")] * 2, None, 1]


@pytest.mark.slow
def test_the_command_starts_and_ends_them_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = runs.written(tmp_path / "run", runs.document())
    assert launch(2, ["train", str(path), "--nproc", "2", "--json", "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["steps"] == 4 and not err
    assert launch(2, ["train", str(path), "--nproc=2", "--set", "train.max_steps=0"]) == 2
    out, err = capfd.readouterr()
    assert not out and err.count("peftctl: error") == 1 and "train.max_steps" in err


@pytest.mark.slow
@pytest.mark.fault(10, 13)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_command_reaches_them_all(number: int, tmp_path: Path) -> None:
    output = tmp_path / "run"
    path = runs.written(output, runs.document(train={"max_steps": 3000, "eval_every": None}))
    command = begun(lambda: sys.exit(launch(2, ["train", str(path), "--nproc", "2", "--quiet"])))
    deadline = time.monotonic() + LONGEST
    while runs.done(output) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(command, number)
    assert ended(command) == 128 + number
    steps = runs.done(output)
    assert [checkpoint.name for checkpoint in (output / "checkpoints").iterdir()] == [f"step-{steps:06d}"]
    assert not (output / "lock").exists()
