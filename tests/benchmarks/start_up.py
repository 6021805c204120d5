"""From a process's start to the end of its first optimizer step, against imports and weights alone. Torch-free."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from tests.benchmarks.sides import PEFTCTL, Setting, environment
from tests.benchmarks.workloads import ROOT, WORKLOADS

BASE = ROOT / ".cache" / "peftctl" / "smollm2-135m"
FLOOR = f"""
import torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(BASE)!r}, dtype=torch.bfloat16)
print("ready", flush=True)
"""


def start_up(setting: Setting, rounds: int) -> None:
    """Both in turn, on a warm cache. The floor imports torch and transformers and reads the weights, and no more."""
    pairs = []
    for number in range(1, rounds + 1):
        pairs.append((_first_step(setting), _floor(setting)))
        ours, floor = pairs[-1]
        print(f"round {number}  first step after {ours:.2f} s, floor {floor:.2f} s: {ours / floor:.2f}", flush=True)
    print(f"median ratio {median(ours / floor for ours, floor in pairs):.2f}")


def _first_step(setting: Setting) -> float:
    workload = WORKLOADS["short"]
    words = [word for override in workload.overrides(1, setting.device) for word in ("--set", override)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "run" / "metrics.jsonl"
        command = [*PEFTCTL, "--quiet", "train", str(workload.recipe), *words, "--output", str(log.parent)]
        return _until(command, setting, lambda: log.exists() and '"step"' in log.read_text("utf-8"))


def _floor(setting: Setting) -> float:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        return _until(["-c", FLOOR], setting, lambda: "ready" in out.read_text("utf-8"), out)


def _until(arguments: Sequence[str], setting: Setting, ready: Callable[[], bool], out: Path | None = None) -> float:
    """Seconds until something is there; the process is ended then."""
    with open(out or "/dev/null", "w") as stdout:
        begun = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment(setting.threads),
        )
        try:
            while not ready():
                if process.poll() is not None and not ready():
                    sys.exit(f"{' '.join(arguments)} ended with {process.returncode}")
                time.sleep(0.005)
            return time.perf_counter() - begun
        finally:
            process.kill()
            process.wait()
