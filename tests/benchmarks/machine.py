"""What a benchmark ran on: versions, processor, what it can do, and the type that is computed in there. Torch-free."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("peftctl", "torch", "transformers", "trl", "peft")
LIMITS = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
)  # what a smaller processor is shown by
# by a process of its own, for the limits are read when torch is imported
ASK = (
    "import torch; from peftctl import compute; report = compute._capabilities(); "
    "names = ('avx2', 'avx512_f', 'avx512_bf16', 'amx_bf16', 'avx_ne_convert'); "
    "print(', '.join(name for name in names if report.get(name)) or report.get('architecture', 'unknown'), "
    "'used up to', torch.backends.cpu.get_cpu_capability()); "
    "print(str(compute.choose('auto', torch.bfloat16, 'cpu').dtype).removeprefix('torch.'))"
)


def machine(threads: int, device: str = "cpu") -> str:
    """Versions, processor with its capabilities, threads, and the type that bfloat16 weights are computed in."""
    versions = ", ".join(f"{package} {_version(package)}" for package in PACKAGES)
    limits = " ".join(f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ)
    lines = [versions, f"{_processor()}, {os.cpu_count()} processors, {threads} threads, on {device}"]
    if device == "cpu":
        abilities, computed = _asked()
        lines += [f"{abilities}; bfloat16 weights are computed in {computed}"]
    return "\n".join(filter(None, [*lines, limits]))


def compute_type(device: str) -> str:
    """What weights stored in bfloat16 are multiplied in on this machine, `auto` asked."""
    return _asked()[1] if device == "cpu" else "bfloat16"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@cache
def _asked() -> tuple[str, str]:
    """The processor's abilities, and the type that bfloat16 weights are computed in."""
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    abilities, computed = done.stdout.splitlines()
    return abilities, computed
