"""A run as a whole: its lock, its repeatability, what it writes for other tools."""

from __future__ import annotations

import io
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from peftctl import display, lock, opened, run
from peftctl.batch import build
from peftctl.errors import InputError
from peftctl.report import Doing
from peftctl.row import Row
from tests import runs
from tests.faults.processes import LONGEST, begun, ended

IDS = tuple(range(20, 45))
BOTH = ("sft", "dpo")


@pytest.mark.parametrize("method", runs.names())
@pytest.mark.fault(46)
def test_the_same_recipe_twice_gives_the_same_bits(method: str, tmp_path: Path) -> None:
    """First what comes first, so that a difference is told where it begins."""
    results = [runs.train(tmp_path / name, runs.document(method), verify=True) for name in ("one", "two")]
    one, two = tmp_path / "one", tmp_path / "two"
    for name in ("base/model.safetensors", "recipe.yaml"):
        assert (one / name).read_bytes().replace(b"/one", b"/two") == (two / name).read_bytes()
    choices = [json.loads((path / "run.json").read_text())["choices"] | {"now": None} for path in (one, two)]
    assert choices[0] == choices[1]
    assert runs.untimed(one) == runs.untimed(two)
    assert runs.bits(one) == runs.bits(two)
    assert results[0]["proof"]["max_difference"] == 0


@pytest.mark.fault(46)
def test_what_memory_is_free_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice that depends on what else runs would give other bits."""
    read, lines = Path.read_text, "MemTotal: 9000000 kB\nMemFree: 1 kB\nMemAvailable: 1 kB\n"
    runs.train(tmp_path / "much", runs.document())
    monkeypatch.setattr(
        Path, "read_text", lambda path, *rest, **more: lines if path.name == "meminfo" else read(path, *rest, **more)
    )
    runs.train(tmp_path / "little", runs.document())
    assert runs.bits(tmp_path / "much") == runs.bits(tmp_path / "little")


@pytest.mark.parametrize(
    ("method", "objective"),
    [
        ("prefix", "sft"),
        *(pytest.param(method, objective, marks=pytest.mark.slow) for method in runs.names() for objective in BOTH),
    ],
)
@pytest.mark.fault(46)
def test_what_memory_held_before_changes_no_bit(method: str, objective: str, tmp_path: Path) -> None:
    """Memory that is had and not yet written to is NaN here: who reads it would learn NaN."""
    runs.train(tmp_path / "plain", runs.document(method, objective))
    with filled():
        runs.train(tmp_path / "filled", runs.document(method, objective))
    assert runs.untimed(tmp_path / "plain") == runs.untimed(tmp_path / "filled")
    assert runs.bits(tmp_path / "plain") == runs.bits(tmp_path / "filled")


@contextmanager
def filled() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("device", "told"), [("cpu", []), ("cuda", ["on cuda some kernels are not deterministic"])])
@pytest.mark.fault(46)
def test_who_cannot_promise_equal_bits_says_so(device: str, told: list[str]) -> None:
    said: list[str] = []
    run._exactness(device, said.append)
    assert [text.partition(":")[0] for text in said] == told


@pytest.mark.parametrize("objective", BOTH)
@pytest.mark.fault(46)
def test_what_other_runs_have_kept_changes_no_bit(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of one epoch keeps nothing, and finds nothing that a longer one kept about the same rows."""
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path / "cache"))
    start = runs.document("lora", objective, method={"layers": [1]}, train={"max_steps": 1})
    runs.train(tmp_path / "start", start)
    upper = {"layers": [1], "init_from": str(tmp_path / "start")}  # a reference that is not the base's
    base = {"name": str(tmp_path / "start" / "base")}
    short, long = (
        runs.document(
            "lora", objective, model=base, method=upper, train={"max_steps": steps, "gradient_accumulation": 1}
        )
        for steps in (3, 8)
    )
    for name, contents in (("one", short), ("longer", long), ("two", short)):
        runs.train(tmp_path / name, contents)
    assert {path.name for path in (tmp_path / "cache").iterdir()} & {"frozen", "references"}
    assert runs.untimed(tmp_path / "one") == runs.untimed(tmp_path / "two")
    assert runs.bits(tmp_path / "one") == runs.bits(tmp_path / "two")


@pytest.mark.parametrize("layout", ["shared", "joined", "padded"])
@pytest.mark.parametrize("objective", ["sft", "dpo", "orpo", "kto"])
@pytest.mark.fault(45)
def test_four_micro_batches_of_one_equal_one_of_four(objective: str, layout: str, tmp_path: Path) -> None:
    for name, size, number in (("one", 4, 1), ("four", 1, 4)):
        train = {"batch_size": size, "gradient_accumulation": number, "optimizer": "sgd", "max_grad_norm": None}
        runs.train(tmp_path / name, runs.document("lora", objective, model={"layout": layout}, train=train))
    pairs = list(zip(runs.events(tmp_path / "one"), runs.events(tmp_path / "four"), strict=True))
    for one, four in pairs:
        keys = [key for key in ("loss", "grad_norm", "validation_loss") if key in one]
        assert [one[key] for key in keys] == pytest.approx([four[key] for key in keys], rel=1e-5)
    one, four = runs.adapter(tmp_path / "one"), runs.adapter(tmp_path / "four")
    trained = [name for name in one if "lora_B" in name]  # 0 at the start, so all of it was learnt
    difference = sum(float((one[name] - four[name]).norm()) for name in trained)
    assert difference < 1e-5 * sum(float(one[name].norm()) for name in trained)


@pytest.mark.fault(15)
def test_a_second_run_in_a_folder_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    _lock(output, os.getppid(), socket.gethostname())
    with pytest.raises(InputError, match=f"process {os.getppid()} on {socket.gethostname()}; if that is not so"):
        runs.train(output, runs.document())
    assert (output / "lock").exists()
    _lock(output, 1, "elsewhere")
    with pytest.raises(InputError, match="process 1 on elsewhere"):
        runs.train(output, runs.document())


@pytest.mark.parametrize("content", ["", "{}", '{"pid": 0, "host": "HOST"}', '{"pid": 4194305, "host": "HOST"}'])
@pytest.mark.fault(15)
def test_a_stale_lock_is_taken_over(content: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "lock").write_text(content.replace("HOST", socket.gethostname()))
    runs.train(output, runs.document(train={"max_steps": 1}))
    assert not (output / "lock").exists()


@pytest.mark.fault(15)
def test_a_lock_of_another_process_with_its_number_is_stale(tmp_path: Path) -> None:
    """After a restart of the machine numbers are given again; one that ended and was never asked for is no writer."""
    output = tmp_path / "run"
    holder = {"pid": os.getppid(), "host": socket.gethostname()}
    for started, alive in (("another boot 17", False), (lock._started(os.getppid()), True)):
        output.mkdir(exist_ok=True)
        (output / "lock").write_text(json.dumps(holder | {"started": started}))
        with pytest.raises(InputError, match="is being written") if alive else nullcontext(), lock.held(output):
            assert json.loads((output / "lock").read_text())["pid"] == os.getpid()
    child = begun(lambda: None)
    started = lock._started(child)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    (output / "lock").write_text(json.dumps({"pid": child, "host": socket.gethostname(), "started": started}))
    with lock.held(output):
        pass
    assert ended(child) == 0


@pytest.mark.fault(15)
def test_of_several_that_find_a_stale_lock_one_takes_it_over(tmp_path: Path) -> None:
    _lock(tmp_path, 4194305, socket.gethostname())
    at = time.monotonic() + 0.3

    def work() -> None:
        time.sleep(max(0.0, at - time.monotonic()))
        try:
            with lock.held(tmp_path):
                (tmp_path / f"held-{os.getpid()}").touch()
                while len(list(tmp_path.glob("refused-*"))) < 5 and time.monotonic() < at + LONGEST:
                    time.sleep(0.05)
        except InputError:
            (tmp_path / f"refused-{os.getpid()}").touch()

    children = [begun(work) for _ in range(6)]
    assert [ended(child) for child in children] == [0] * 6
    assert (len(list(tmp_path.glob("held-*"))), len(list(tmp_path.glob("refused-*")))) == (1, 5)


def _lock(output: Path, pid: int, host: str) -> None:
    (output / "lock").write_text(json.dumps({"pid": pid, "host": host}))


def test_a_run_on_a_stored_base_is_not_written_over(tmp_path: Path) -> None:
    runs.train(tmp_path / "made", runs.document())
    contents = runs.document(model={"name": str(tmp_path / "made" / "base")})
    runs.train(tmp_path / "run", contents)
    with pytest.raises(InputError, match="holds a run already: --resume"):
        runs.train(tmp_path / "run", contents)
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(InputError, match="holds a run already"):
        runs.train(tmp_path / "run", contents)


def test_a_fresh_run_on_a_bare_architecture_draws_its_base_anew(tmp_path: Path) -> None:
    gpt2 = {"name": str(runs.CONFIGS / "models" / "tiny-gpt2.json")}
    runs.train(tmp_path / "run", runs.document())
    runs.train(tmp_path / "run", runs.document("bitfit", model=gpt2))
    assert json.loads((tmp_path / "run" / "base" / "config.json").read_text())["model_type"] == "gpt2"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by old names
@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_peft_gives_the_same_answers(method: str, tmp_path: Path) -> None:
    import peft

    output = tmp_path / "run"
    runs.train(output, runs.document(method))
    model = peft.PeftModel.from_pretrained(_base(output), str(output / "adapter")).eval()
    torch.testing.assert_close(_ours(output), _logprobs(model), rtol=1e-5, atol=2e-5)
    assert not torch.allclose(_ours(output), _logprobs(_base(output)), atol=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by old names
def test_an_adapter_of_peft_opens_here(tmp_path: Path) -> None:
    import peft

    runs.train(tmp_path / "made", runs.document())
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(_base(tmp_path / "made"), config).eval()
    model.save_pretrained(tmp_path / "theirs")
    found = _ours(tmp_path / "theirs", str(tmp_path / "made" / "base"))
    torch.testing.assert_close(found, _logprobs(model), rtol=1e-5, atol=2e-5)


def _base(output: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(output / "base").eval()


@torch.no_grad()
def _logprobs(model: Any) -> Tensor:
    ids = torch.tensor([IDS])
    logits = model(input_ids=ids).logits[0].float().log_softmax(-1)
    return logits[:-1].gather(1, ids[0, 1:, None])[:, 0]


@torch.no_grad()
def _ours(path: Path, base: str | None = None) -> Tensor:
    policy = opened.open(opened.find(str(path), base), device="cpu").policy
    return policy.tokens(build([Row(IDS, (1.0,) * len(IDS), 0)])).logprob


def test_what_is_shown_of_a_step_is_not_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Doing] = []
    stream = io.StringIO()

    class Heard(display.Lines):
        def progress(self, doing: Doing) -> None:
            super().progress(doing)
            told.append(doing)

    monkeypatch.setattr(run, "display", lambda steps, quiet: Heard(steps, stream))
    runs.train(tmp_path / "heard", runs.document())
    monkeypatch.undo()
    runs.train(tmp_path / "quiet", runs.document())
    assert {doing.what for doing in told} == {"step", "evaluation"} and max(doing.tokens for doing in told) > 0
    assert runs.untimed(tmp_path / "heard") == runs.untimed(tmp_path / "quiet")
    assert runs.bits(tmp_path / "heard") == runs.bits(tmp_path / "quiet")
    lines = stream.getvalue().splitlines()
    assert sum(line.startswith("loading the base ") for line in lines) == 1
    assert not any("micro-batch" in line for line in lines), "these steps are short"
