"""The type that products are taken in: how it is chosen, that a run keeps it, and what the commands say of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from peftctl import cli, compute
from peftctl.compute import choose
from peftctl.errors import InputError
from tests import runs

AMD_EPYC_7 = {"architecture": "x86_64", "avx2": True, "avx512_f": False}
SKYLAKE = {"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False}
ZEN_4 = {"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": True}
SAPPHIRE_RAPIDS = {**ZEN_4, "amx_bf16": True}
ARROW_LAKE = {"architecture": "x86_64", "avx2": True, "avx_ne_convert": True}
GRAVITON = {"architecture": "aarch64"}
EMULATED = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """What torch reports of the processor, for tests to say."""
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(compute, "_onednn_bfloat16", lambda: True)

    def set_report(report: dict[str, Any]) -> None:
        monkeypatch.setattr(compute, "_capabilities", lambda: report)

    return set_report


@pytest.mark.parametrize(
    ("report", "fast"), [(AMD_EPYC_7, False), (SKYLAKE, False), (ZEN_4, True), (SAPPHIRE_RAPIDS, True)]
)
def test_bfloat16_is_fast_where_the_processor_has_it(
    report: dict[str, Any], fast: bool, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(report)
    monkeypatch.setattr(compute, "timed", lambda: pytest.fail("torch knows this processor"))
    assert compute.fast_bfloat16() is fast
    assert choose("auto", torch.bfloat16, "cpu").dtype is (torch.bfloat16 if fast else torch.float32)


@pytest.mark.parametrize("report", [ARROW_LAKE, GRAVITON, {}])
@pytest.mark.parametrize("fast", [False, True])
def test_a_processor_that_torch_does_not_know_is_timed_once(
    report: dict[str, Any], fast: bool, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(report)
    monkeypatch.setattr(compute, "timed", lambda: fast)
    assert compute.fast_bfloat16() is fast
    monkeypatch.setattr(compute, "timed", lambda: not fast)  # a second timing may well differ
    assert compute.fast_bfloat16() is fast
    machine({**report, "cpu_name": "another"})
    assert compute.fast_bfloat16() is not fast


def test_a_damaged_cache_of_timings_is_timed_again(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(GRAVITON)
    monkeypatch.setattr(compute, "timed", lambda: True)
    assert compute.fast_bfloat16()
    path = compute.cache_folder() / "compute.json"
    for damage in ("", "[]", "{", '{"x": 1}'):
        path.write_text(damage)
        assert compute.fast_bfloat16()


@pytest.mark.parametrize(("ratio", "fast"), [(0.5, False), (1.0, False), (1.2, False), (1.4, True), (10.0, True)])
def test_the_timing_favours_float32(ratio: float, fast: bool) -> None:
    """Equal rates, and bfloat16 a little ahead, are answered by float32."""
    ticks = [0.0]
    seconds = iter([1.0] * 8 + [ratio] * 8)  # of the products in bfloat16, then of those in float32

    def clock() -> float:
        ticks[0] += next(seconds)
        return ticks[0]

    assert compute.timed(clock) is fast


def test_a_forbidden_instruction_set_is_not_counted_on() -> None:
    """The environment variables that bring a larger processor near a smaller one."""
    code = (
        "import torch; from peftctl import compute; c = compute.choose('auto', torch.bfloat16, 'cpu');"
        "print(c.dtype, c.reason)"
    )
    for extra in (EMULATED, {"ATEN_CPU_CAPABILITY": "default"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}):
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | extra, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "torch.float32 this processor has no fast bfloat16", extra


def test_what_is_asked_for_is_taken() -> None:
    assert choose("bfloat16", torch.float32, "cpu").dtype is torch.bfloat16
    assert choose("float32", torch.bfloat16, "cpu").dtype is torch.float32
    assert choose("auto", torch.float32, "cpu").dtype is torch.float32
    for requested, stored in (("float16", torch.float32), ("auto", torch.float16)):
        choice = choose(requested, stored, "cpu")
        assert choice.dtype is torch.float32 and "float16" in choice.reason
    with pytest.raises(InputError, match="'half' is not known; auto, float32, bfloat16, float16 are"):
        choose("half", torch.float32, "cpu")


def half(**train: Any) -> dict[str, Any]:
    """A recipe of two steps over a base that is stored in bfloat16."""
    return runs.document(model={"dtype": "bfloat16"}, train={"max_steps": 2, "save_every": 1, **train})


def choices(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "run.json").read_text())["choices"]
    return found


def fast(monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    monkeypatch.setattr(compute, "fast_bfloat16", lambda: answer)


def test_a_run_says_and_records_what_it_computes_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fast(monkeypatch, False)
    runs.written(tmp_path / "run", half())
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(tmp_path / "run.yaml")])
    assert not ended.value.code
    line = "computing in float32, with weights stored in bfloat16: this processor has no fast bfloat16"
    assert capsys.readouterr().err.count(line) == 1
    assert (choices(tmp_path / "run")["dtype"], choices(tmp_path / "run")["compute_dtype"]) == ("bfloat16", "float32")


def test_where_bfloat16_is_fast_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fast(monkeypatch, True)
    runs.written(tmp_path / "run", half())
    with pytest.raises(SystemExit):
        cli.main(["train", str(tmp_path / "run.yaml"), "--no-verify"])
    assert "computing in" not in capsys.readouterr().err
    assert choices(tmp_path / "run")["compute_dtype"] == "bfloat16"


def test_the_losses_are_those_of_a_base_stored_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base of the second run is the first one's, widened: the same numbers."""
    fast(monkeypatch, False)
    runs.train(tmp_path / "narrow", half())
    base = {"name": str(tmp_path / "narrow" / "base"), "dtype": "bfloat16"}
    losses = []
    for name, more in (("narrow-again", base), ("explicit", base)):
        contents = half(compute_dtype="float32" if name == "explicit" else "auto")
        contents["model"] |= more
        runs.train(tmp_path / name, contents)
        losses.append([event["loss"] for event in runs.events(tmp_path / name) if event["event"] == "step"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("before", [False, True])
def test_a_resumed_run_computes_as_it_did(
    before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fast(monkeypatch, before)
    runs.train(tmp_path / "whole", half())
    runs.train(tmp_path / "run", half(max_steps=1))
    fast(monkeypatch, not before)
    runs.written(tmp_path / "run", half())
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(tmp_path / "run.yaml"), "--resume", "--no-verify"])
    assert not ended.value.code
    assert choices(tmp_path / "run")["compute_dtype"] == ("bfloat16" if before else "float32")
    assert runs.bits(tmp_path / "whole") == runs.bits(tmp_path / "run")
    said = capsys.readouterr().err
    assert ("the run began on a machine with fast bfloat16, which this one lacks" in said) is before


def test_a_run_from_before_the_type_was_recorded_computes_as_it_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast(monkeypatch, True)
    runs.train(tmp_path / "run", half(max_steps=1))
    document = json.loads((tmp_path / "run" / "run.json").read_text())
    del document["choices"]["compute_dtype"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(document))
    fast(monkeypatch, False)
    runs.train(tmp_path / "run", half(), resume=True)
    assert choices(tmp_path / "run")["compute_dtype"] == "bfloat16"


def test_a_resumed_run_may_be_told_another_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fast(monkeypatch, True)
    runs.train(tmp_path / "run", half(max_steps=1))
    runs.written(tmp_path / "run", half(compute_dtype="float32"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(tmp_path / "run.yaml"), "--resume", "--no-verify"])
    assert not ended.value.code
    assert "computing in float32 from here on; the run computed in bfloat16 so far" in capsys.readouterr().err
    assert choices(tmp_path / "run")["compute_dtype"] == "float32"


def test_commands_without_a_recipe_take_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fast(monkeypatch, True)
    runs.train(tmp_path / "run", half())
    data = str(runs.CONFIGS / "data" / "messages.jsonl")
    answers = {}
    for name in ("float32", "bfloat16"):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            cli.main(["eval", str(tmp_path / "run"), "--data", data, "--compute-dtype", name, "--json"])
        out = capsys.readouterr()
        answers[name] = json.loads(out.out)["loss"]
        assert ("computing in float32" in out.err) is False  # the base of a random run is stored in float32
    assert answers["float32"] != answers["bfloat16"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", str(tmp_path / "run"), "--prompt", "x", "--compute-dtype", "int3"])
    assert ended.value.code == 2
    assert "--compute-dtype: 'int3' is not known; auto, float32, bfloat16, float16 are" in capsys.readouterr().err
