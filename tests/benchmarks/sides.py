"""Runs either side of a comparison as a process of its own, and reads off what it took. Torch-free."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.machine import compute_type
from tests.benchmarks.workloads import HELD_OUT, ROOT, Workload

PEFTCTL = ("-m", "peftctl.cli")
OURS = "peftctl"
PEERS = ("in order", "by length", "by length, eager", "by length, autocast")  # peer.py tells what they are
PAIRED = ("in order", "in order, autocast")
PRECOMPUTED = ("precomputed", "precomputed, autocast")  # the reference asked once, before the first step
ON_CUDA = {"padding-free": "flash_attn", "unsloth": "unsloth"}  # and the package that each needs
WAYS = tuple(dict.fromkeys((*PEERS, *PAIRED, *PRECOMPUTED, *ON_CUDA)))


class Setting(NamedTuple):
    """What is equal for both sides of a comparison."""

    steps: int
    threads: int
    device: str


class Measured(NamedTuple):
    """One run. Tokens are those in the rows: padding is never counted, what rows share is counted once for each."""

    side: str
    tokens_per_s: float  # over the warm steps
    step_s: float  # a warm step on average
    process_s: float  # the whole process, from its start to its end
    peak_bytes: int  # largest resident size
    tokens: int  # of all steps
    pairs_per_s: float | None  # where rows are pairs
    loss: float | None = None  # on held-out rows


def peers(workload: Workload, device: str) -> tuple[str, ...]:
    """The variants of the peer that can be run here."""
    half = "model.dtype=float32" not in workload.sets and compute_type(device) == "bfloat16"
    # its trainer for pairs does not sort by length
    ways = PEERS if workload.pairs is None else (*PAIRED, *(PRECOMPUTED if workload.again else ()))
    own = [name for name in ways if half or "autocast" not in name]
    if device == "cuda":
        own += [name for name, package in ON_CUDA.items() if find_spec(package)]
    return tuple(own)


def measured(
    side: str,
    workload: Workload,
    setting: Setting,
    extra: Sequence[str] = (),
    loss: bool = True,
    without: str | None = None,
) -> Measured:
    """Train the workload on one side: `peftctl`, or a variant of the peer. `extra`: further overrides.

    `without`: a technique to take out of ours, see without.py.
    """
    words = _set([*workload.overrides(setting.steps, setting.device), *extra])
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        if side == OURS:
            program = PEFTCTL if without is None else ("-m", "tests.benchmarks.without", without)
            command = [
                *program,
                "train",
                str(workload.recipe),
                *words,
                "--output",
                str(output),
                "--no-verify",
                "--quiet",
            ]
        else:
            # it computes in the type that it stores: on this machine in the faster one
            words = words if compute_type(setting.device) == "bfloat16" else [*words, *_set(["model.dtype=float32"])]
            way = ["--variant", side, "--output", str(output)]
            command = ["-m", "tests.benchmarks.peer", str(workload.recipe), *words, *way]
        # a cache of its own, so that its reference is asked before its first epoch and no earlier
        own = {"PEFTCTL_CACHE": str(Path(folder) / "cache")} if workload.again else {}
        seconds, peak, _ = run(command, setting.threads, own)
        steps = _steps(output)
        adapter = output / "adapter" if side == OURS else output
        held_out = _held_out(adapter, workload, setting) if loss and workload.held_out else None
    warm = steps[workload.warm(len(steps))]
    taken, tokens = sum(step["seconds"] for step in warm), sum(step["tokens"] for step in warm)
    everything = round(sum(step["tokens"] for step in steps))
    pairs = workload.pairs * len(warm) / taken if workload.pairs else None
    return Measured(side, tokens / taken, taken / len(warm), seconds, peak, everything, pairs, held_out)


def ceiling(workload: Workload, setting: Setting) -> dict[str, Any]:
    """What roofline.py says of a workload: operations of each step, and how fast the machine multiplies."""
    words = _set(workload.overrides(setting.steps, setting.device))
    found: dict[str, Any] = json.loads(
        run(["-m", "tests.benchmarks.roofline", str(workload.recipe), *words], setting.threads)[2]
    )
    return found


def environment(threads: int) -> dict[str, str]:
    """That of a process of so many threads, off the network."""
    count = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**os.environ, **count, **quiet, "TOKENIZERS_PARALLELISM": "false"}


def run(arguments: Sequence[str], threads: int, own: Mapping[str, str] | None = None) -> tuple[float, int, str]:
    """Seconds, peak resident bytes and stdout of a Python process of so many threads, with variables of its `own`.

    Leaves when it fails.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        begun = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=out, stderr=err, cwd=ROOT, env={**environment(threads), **(own or {})}
        )
        _, status, usage = os.wait4(process.pid, 0)  # of this child alone
        seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, err):
            file.seek(0)
        if process.returncode:
            sys.exit(f"{' '.join(arguments)}\nended with {process.returncode}:\n{err.read()[-4000:]}")
        unit = 1 if sys.platform == "darwin" else 1024
        return seconds, usage.ru_maxrss * unit, out.read()


def _set(overrides: Sequence[str]) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def _steps(output: Path) -> list[dict[str, Any]]:
    """Seconds and tokens of each step: from our log, or from what peer.py wrote."""
    if (output / "metrics.jsonl").exists():
        events = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
        return [event for event in events if event["event"] == "step"]
    found: list[dict[str, Any]] = json.loads((output / "steps.json").read_text("utf-8"))
    return found


def _held_out(adapter: Path, workload: Workload, setting: Setting) -> float:
    """Loss on the demo's held-out dialogues: of both sides by the same program."""
    command = [*PEFTCTL, "eval", str(adapter), "--data", str(HELD_OUT), "--device", setting.device, "--json"]
    return float(json.loads(run(command, setting.threads)[2])["loss"])
