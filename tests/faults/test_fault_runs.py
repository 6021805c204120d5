"""What can happen to a run besides its disk: signals, edited recipes, mistyped paths, no memory, standing still."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from peftctl import checkpoint, cli, guards, run, trainer
from peftctl.errors import InputError, RecipeError, Stopped, TrainingError
from peftctl.objectives.base import Loss
from peftctl.plan import Options
from tests import runs
from tests.cost import seconds
from tests.faults.conftest import Seen
from tests.faults.processes import in_child
from tests.test_checkpoint import forge
from tests.test_trainer import SFT, Run, Shuffled, make, make_rows

LONG = runs.document(train={"max_steps": 12, "save_every": 3})


def heard(output: Path, contents: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    """What a resumed run tells its user."""
    capsys.readouterr()
    run.train(runs.loaded(output, contents), Options(resume=True, verify=False))
    return capsys.readouterr().err


def stopped(output: Path, contents: dict[str, Any]) -> None:
    with runs.stopped_after(2, output), pytest.raises(Stopped):
        runs.train(output, contents)


@pytest.mark.fault(5)
def test_there_are_no_workers_to_change_the_order(tmp_path: Path, seen: Seen) -> None:
    with pytest.raises(RecipeError, match=r"train\.num_workers is not a key") as caught:
        runs.train(tmp_path / "run", runs.document(train={"num_workers": 2}))
    seen("one process reads the data; train.num_workers is not a key")
    assert caught.value.exit_code == 2


@pytest.mark.fault(6)
def test_what_may_change_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str], seen: Seen) -> None:
    output = tmp_path / "run"
    stopped(output, runs.document())
    said = heard(output, runs.document(train={"learning_rate": 0.001, "max_steps": 5}), capsys)
    notices = [line for line in said.splitlines() if line.startswith("changed since the run began: ")]
    assert [line.rpartition(": train.")[2] for line in notices] == ["max_steps: 4 -> 5", "learning_rate: 0.01 -> 0.001"]
    seen(notices[0])


@pytest.mark.fault(6, 43)
def test_a_step_may_be_cut_otherwise_as_long_as_it_has_the_same_examples(tmp_path: Path) -> None:
    output = tmp_path / "run"
    runs.train(tmp_path / "whole", runs.document())
    stopped(output, runs.document())
    runs.train(output, runs.document(train={"batch_size": 1, "gradient_accumulation": 4}), resume=True)
    one, other = runs.adapter(tmp_path / "whole"), runs.adapter(output)
    assert all(torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-6) for name in one)


@pytest.mark.fault(8)
def test_going_on_after_a_million_examples_costs_nothing(tmp_path: Path, seen: Seen) -> None:
    output = tmp_path / "run"
    stopped(output, runs.document())
    number = count()
    cold = seconds(lambda: runs.train(tmp_path / f"cold-{next(number)}", runs.document()))
    path = output / "checkpoints" / "step-000002"
    state = json.loads((path / "state.json").read_text())
    state["progress"]["position"] = 10**6
    forge(path, "state.json", json.dumps(state).encode())

    def resumed() -> None:
        copy = Path(shutil.copytree(output, tmp_path / f"warm-{next(number)}"))
        assert runs.train(copy, runs.document(), resume=True)["steps"] == 4

    warm = seconds(resumed)
    assert warm < 2 * cold
    seen(f"{warm:.2f} s, a cold start {cold:.2f} s")


def to_first_step(output: Path, contents: dict[str, Any], **options: Any) -> float:
    """Processor seconds from the command's start until a step is done."""
    ends: list[float] = []
    loop = trainer._between

    def ended(*args: Any, **more: Any) -> None:
        if not more:  # a step, not what comes before the first one
            ends.append(time.process_time())
        loop(*args, **more)

    begun = time.process_time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_between", ended)
        runs.train(output, contents, **options)
    return ends[0] - begun


@pytest.mark.slow
@pytest.mark.fault(8)
def test_a_million_rows_consumed_the_first_step_comes_as_fast_as_at_the_start(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Seen
) -> None:
    """Of a file of 60,000 rows, in its 17th epoch; both read the tokens that are kept."""
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text((runs.CONFIGS / "data" / "messages.jsonl").read_text() * 5000)
    train = {"max_steps": 2, "save_every": 1, "eval_every": None}
    data = {"train": str(rows), "limit": None, "validation": None}
    contents = runs.document(model={"name": str(trained / "base")}, data=data, train=train)
    runs.train(tmp_path / "first", contents)  # tokenises
    cold, warm = list[float](), list[float]()
    for trial in range(3):
        output = tmp_path / str(trial)
        cold.append(to_first_step(output, contents))
        path = output / "checkpoints" / "step-000001"
        state = json.loads((path / "state.json").read_text())
        state["progress"]["position"] = 10**6
        forge(path, "state.json", json.dumps(state).encode())
        warm.append(to_first_step(output, contents, resume_from=str(path)))
    assert min(warm) < 2 * min(cold)
    seen(f"{min(warm):.2f} s, a cold start {min(cold):.2f} s")


@pytest.mark.fault(9)
@pytest.mark.parametrize("options", [{"resume": True}, {"resume_from": "runs/mistyped/checkpoints/step-000002"}])
def test_a_mistyped_path_is_refused_and_nothing_is_made(options: dict[str, Any], tmp_path: Path, seen: Seen) -> None:
    recipe = runs.loaded(tmp_path / "run", runs.document())
    with pytest.raises(InputError, match=r"^--resume(-from)?: there is no (run in|folder) ") as caught:
        run.train(recipe, Options(quiet=True, **options))
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    seen(caught)


def interrupted(output: Path, number: int, after: float) -> int:
    """The exit code of a command that gets a signal after so many seconds."""

    def work() -> None:
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
        signal.setitimer(signal.ITIMER_REAL, after)
        command = ["--quiet", "train", str(runs.written(output, LONG)), "--no-verify"]
        cli.main(command + (["--resume"] if (output / "run.json").exists() else []))

    return in_child(work)


def assert_random_signals(tmp_path: Path, trials: int) -> dict[int, int]:
    """Signals at random moments of a run until it is done, so many times; the result is that of a run without."""
    begun = time.perf_counter()
    runs.train(tmp_path / "whole", LONG)
    span = time.perf_counter() - begun
    codes: dict[int, int] = {}
    generator = torch.Generator().manual_seed(3)
    for trial in range(trials):
        number = (signal.SIGTERM, signal.SIGINT)[trial % 2]
        output = tmp_path / str(trial)
        code = interrupted(output, number, span * (0.02 + float(torch.rand((), generator=generator))))
        # before the run listens, SIGTERM ends it as it ends any process
        assert code in (0, 128 + number) or (code, number) == (-signal.SIGTERM, signal.SIGTERM), code
        codes[code] = codes.get(code, 0) + 1
        if code:
            runs.train(output, LONG, resume=(output / "run.json").exists())
        assert runs.untimed(output) == runs.untimed(tmp_path / "whole")
        name = "adapter/adapter_model.safetensors"
        assert runs.bits(output)[name] == runs.bits(tmp_path / "whole")[name]
    return codes


@pytest.mark.fault(10)
def test_signals_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    assert_random_signals(tmp_path, 4)


@pytest.mark.slow
@pytest.mark.hundreds
@pytest.mark.fault(10)
def test_a_hundred_signals_at_random_moments_lose_nothing(tmp_path: Path, seen: Seen) -> None:
    codes = assert_random_signals(tmp_path, 100)
    assert len(codes) > 1
    seen(f"exit codes {', '.join(f'{code}: {count} times' for code, count in sorted(codes.items()))}; equal bits")


def spoilt(at: int, spoil: Callable[[Loss], Loss]) -> pytest.MonkeyPatch:
    """What happens to the loss of a micro-batch of training, counted from 1."""
    count, loss, patch = 0, trainer.Question.loss, pytest.MonkeyPatch()

    def changed(self: trainer.Question, batch: Any) -> Loss:
        nonlocal count
        answer = loss(self, batch)
        count += any(term.sum.requires_grad for term in answer.terms)
        return spoil(answer) if count == at else answer

    patch.setattr(trainer.Question, "loss", changed)
    return patch


@pytest.mark.fault(41, 42)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_run_with_a_bad_loss_ends_with_sound_checkpoints(bad: float, tmp_path: Path, seen: Seen) -> None:
    output = tmp_path / "run"
    contents = runs.document(train={"save_every": 1})
    patch = spoilt(6, lambda loss: loss._replace(terms=tuple(t._replace(sum=t.sum * bad) for t in loss.terms)))
    with pytest.raises(TrainingError, match=r"step 3: the loss is (nan|inf).*lr .*, examples \d") as caught:
        runs.train(output, contents)
    patch.undo()
    path = checkpoint.newest(output)
    assert path is not None and path.name == "step-000002"
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.load(path).adapter.values())
    last = runs.events(output)[-1]
    assert (last["event"], last["step"]) == ("failure", 3) and last["loss"] in ("NaN", "Infinity")
    runs.train(output, contents, resume=True)
    runs.train(tmp_path / "whole", contents)
    assert runs.untimed(output) == runs.untimed(tmp_path / "whole")
    seen(caught)


def exhausted_by_torch(loss: Loss) -> Loss:
    torch.empty(1 << 60, dtype=torch.uint8)
    raise AssertionError("that much memory is not there")


def exhausted_on_a_card(loss: Loss) -> Loss:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")


def exhausted_in_python(loss: Loss) -> Loss:
    raise MemoryError


@pytest.mark.fault(43)
@pytest.mark.parametrize("exhaust", [exhausted_by_torch, exhausted_on_a_card, exhausted_in_python])
def test_out_of_memory_names_the_levers_and_they_work(
    exhaust: Callable[[Loss], Loss], tmp_path: Path, seen: Seen
) -> None:
    output = tmp_path / "run"
    patch = spoilt(6, exhaust)
    with pytest.raises(TrainingError, match=r"^step 3: out of memory \(.*\); set train") as caught:
        runs.train(output, runs.document(train={"save_every": 1}))
    patch.undo()
    for lever in ("train.batch_size", "train.tokens_per_batch", "train.gradient_checkpointing", "data.max_length"):
        assert lever in str(caught.value)
    lighter = {"batch_size": 1, "gradient_accumulation": 4, "gradient_checkpointing": True, "tokens_per_batch": 64}
    assert runs.train(output, runs.document(train={"save_every": 1, **lighter}), resume=True)["steps"] == 4
    seen(caught)


@pytest.mark.fault(43)
def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="shapes"), guards.memory("step 1"):
        raise RuntimeError("shapes cannot be multiplied")


def toy(steps: int = 2 * guards.PATIENCE, kind: str = "adamw", **more: Any) -> Run:
    return make(Shuffled(make_rows(10)), kind=kind, steps=steps, **more)


@pytest.mark.fault(44)
def test_parameters_that_do_not_move_stop_the_run(seen: Seen) -> None:
    """A rate too small for the parameters' type changes nothing, without any error."""
    run = toy()
    for group in run.job.optimizer.param_groups:
        group["peak"] = 1e-30
    with pytest.raises(
        TrainingError, match=r"step 51: no parameter changed in 50 steps \(lr .*train\.learning_rate"
    ) as e:
        run.train()
    assert "\n" not in str(e.value) and not run.saved
    seen(e)


def constant(value: float) -> Callable[..., Loss]:
    def loss(*args: Any) -> Loss:
        answer = SFT.loss(*args)
        return answer._replace(terms=(answer.terms[0]._replace(sum=answer.terms[0].sum * 0 + value * weight(args[2])),))

    def weight(batch: Any) -> float:
        return sum(SFT.weights(batch, None))

    return loss


@pytest.mark.fault(44)
def test_a_loss_that_never_changes_stops_the_run(seen: Seen) -> None:
    """Not of 0: a sum that cancels, as grpo's, is 0 with a slope. Without one no parameter changes."""
    run = toy()

    def stir(step: int, total: int) -> None:
        assert run.policy.head.bias.grad is not None
        run.policy.head.bias.grad.add_(1)  # something moves, but not by the loss

    question = replace(run.job.question, objective=replace(SFT, loss=constant(2.0)))
    run.job = replace(run.job, question=question, after_backward=stir)
    with pytest.raises(TrainingError, match=r"the loss was exactly 2 for 50 steps .*no label depends") as e:
        run.train()
    seen(e)


@pytest.mark.fault(44)
def test_training_that_goes_on_is_left_alone() -> None:
    assert toy().train().step == 100
    still = toy()
    still.job = replace(still.job, schedule=lambda step: 0.0)
    assert still.train().step == 100, "a learning rate of 0 was asked for"


@pytest.mark.fault(44)
def test_a_loss_that_came_down_to_0_has_learnt_all_there_is() -> None:
    parameter = torch.zeros(1)
    watch = guards.Standstill({"p": parameter})
    for step in range(1, 200):
        parameter += 1
        watch.check(step, 0.0 if step > 3 else 1.0 / step, 0.1)


@pytest.mark.fault(44)
def test_a_loss_that_cancels_to_0_and_has_a_slope_is_no_standstill() -> None:
    """Advantages of two answers, say: plus and minus as much."""
    parameter = torch.zeros(1)
    watch, flat = guards.Standstill({"p": parameter}), guards.Standstill({"p": parameter})
    for step in range(1, 200):
        parameter += 1
        watch.check(step, 0.0, 0.1, norm=0.5)
    with pytest.raises(TrainingError, match="no label depends"):
        for step in range(1, 200):
            parameter += 1
            flat.check(step, 0.0, 0.1)


@pytest.mark.fault(44)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_the_last_bit_of_one_number_is_a_change(dtype: torch.dtype) -> None:
    tensor = torch.arange(1000).remainder(100).to(dtype)
    bits = tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    watch = guards.Standstill({"none": torch.zeros(0), "one": tensor})
    for step in range(1, 200):
        if step % 50 == 0:
            bits[500] ^= 1
            bits[501] ^= step == 100
        watch.check(step, float(step), 0.1)
    with pytest.raises(TrainingError, match="no parameter changed"):
        for step in range(200, 300):
            watch.check(step, float(step), 0.1)


@pytest.mark.fault(46)
def test_pythons_own_generator_is_the_recipes_too(tmp_path: Path) -> None:
    """Some models drop whole layers by it."""
    states = []
    for name in ("one", "other"):
        random.seed(name)
        runs.train(tmp_path / name, runs.document(train={"max_steps": 1}))
        path = checkpoint.newest(tmp_path / name)
        assert path is not None
        states.append((path / "rng.safetensors").read_bytes())
    assert states[0] == states[1]
