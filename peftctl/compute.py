"""The type that products are taken in, which may be wider than the one that weights are stored in.

`auto` multiplies in the stored type where the device does that at full speed, and else in float32. The answer depends
on the machine alone, so equal recipes give equal bits on it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from peftctl.base import cache_folder
from peftctl.errors import InputError

if TYPE_CHECKING:
    import torch

ComputeType = Literal["auto", "float32", "bfloat16", "float16"]
NAMES: tuple[ComputeType, ...] = ("auto", "float32", "bfloat16", "float16")
MARGIN = 1.3  # how many times faster bfloat16 must be than float32 before a timing decides for it
# what a processor has that multiplies bfloat16 without widening it first, as torch reports it
NATIVE = ("avx512_bf16", "amx_bf16", "avx10_2")
SHAPE = (1024, 1024, 256)  # out, in, rows of the products that are timed


class Precision(NamedTuple):
    """What a recipe or an option asks for: the type that weights are stored in, and the one they are multiplied in."""

    stored: str = "auto"  # auto: as in the base's files
    compute: str = "auto"  # one of `NAMES`


AUTO = Precision()


class Choice(NamedTuple):
    """`reason` says why it is not the stored type; empty where it is."""

    dtype: torch.dtype
    reason: str = ""


def choose(requested: str, stored: torch.dtype, device: str) -> Choice:
    """The type to multiply weights of a stored type in. Raises InputError for a name that is none.

    `requested`: one of `NAMES`. What the device cannot do is replaced by float32, with the reason.
    """
    import torch

    if requested not in NAMES:
        raise InputError(f"compute_dtype: {requested!r} is not known; {', '.join(NAMES)} are")
    wanted = stored if requested == "auto" else getattr(torch, requested)
    if device != "cpu":
        return _on_accelerator(wanted, device)
    if wanted is torch.float16:
        return Choice(torch.float32, "the CPU has no complete float16 kernels")
    if wanted is torch.bfloat16 and requested == "auto" and not fast_bfloat16():
        return Choice(torch.float32, "this processor has no fast bfloat16")
    return Choice(wanted)


def describe(choice: Choice, stored: torch.dtype) -> str:
    """A line that says what a model is computed in, where that is not the type that it is stored in."""
    why = f": {choice.reason}" if choice.reason else ""
    return f"computing in {_name(choice.dtype)}, with weights stored in {_name(stored)}{why}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _on_accelerator(wanted: torch.dtype, device: str) -> Choice:
    import torch

    if wanted is torch.bfloat16 and device.startswith("cuda"):
        major, _ = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and major < 8:  # before Ampere it is emulated
            return Choice(torch.float32, "this card has no bfloat16")
    return Choice(wanted)


def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32, forward and backward.

    Asked of torch; where torch does not know the processor, timed once and remembered for this machine and torch.
    """
    known = _reported()
    return _remembered_timing() if known is None else known


def _reported() -> bool | None:
    """What torch says about the processor; None where it says too little.

    Its report is of the hardware. ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA may forbid the use of what is there.
    """
    import torch

    report = _capabilities()
    if report.get("architecture") != "x86_64":
        return None
    if not any(report.get(name) for name in NATIVE):
        # avx_ne_convert alone converts fast and multiplies in float32: which is faster is not known
        return None if report.get("avx_ne_convert") else False
    allowed = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
    return allowed and _onednn_bfloat16()


def _onednn_bfloat16() -> bool:
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _capabilities() -> dict[str, Any]:
    import torch

    try:
        return dict(torch.cpu.get_capabilities())
    except (AttributeError, RuntimeError):
        return {}


def _remembered_timing() -> bool:
    """The answer of the timing on this machine: a second one could differ, and with it the bits of equal runs."""
    import torch

    report, limits = _capabilities(), [os.environ.get(name) for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")]
    machine = json.dumps([torch.__version__, report, limits], sort_keys=True, default=str)
    path = cache_folder() / "compute.json"
    try:
        answers = json.loads(path.read_text("utf-8"))
        if isinstance(answers[machine], bool):
            return bool(answers[machine])
    except (OSError, ValueError, KeyError, TypeError):
        answers = {}
    answer = timed()
    with suppress(OSError):  # without a cache the timing is made again
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps((answers if isinstance(answers, dict) else {}) | {machine: answer}), "utf-8")
        temporary.replace(path)
    return answer


def timed(clock: Callable[[], float] = time.perf_counter) -> bool:
    """Whether products in bfloat16 beat those in float32 by `MARGIN`, forward and backward, in the best of three."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        out, width, rows = SHAPE
        weight, x = torch.ones(out, width, dtype=dtype), torch.ones(rows, width, dtype=dtype)
        grad, best = torch.ones(rows, out, dtype=dtype), float("inf")
        for _ in range(4):  # the first prepares the kernels
            begun = clock()
            torch.nn.functional.linear(x, weight)
            grad @ weight
            best = min(best, clock() - begun)
        return best

    with torch.no_grad():
        return seconds(torch.bfloat16) * MARGIN < seconds(torch.float32)
