"""How fast a run is while another process computes on the same processors.

Usage: python -m tests.benchmarks.busy [--rounds N] [--steps N] [--seconds S] [--dtype D] [--way WAY]... [--beside B]...

Each measurement is a process of its own, on the everyday recipe, with as many threads as there are processors; who
begins changes from round to round. The ways: `bound`, as peftctl binds its threads by itself, and `plain`, OpenMP's own
default. Beside it runs nothing (`quiet`), one Python loop (`loop`), products of matrices by as many threads as there
are processors (`products`), or the same run once more (`run`). A step counts from the third on; a run that takes longer
than the seconds is ended, and what it did until then counts. `others` is the processor time that neither the run nor
what was put beside it took, per second: where it is not about 0, the machine was not free for this. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

from tests.benchmarks.sides import PEFTCTL, Setting
from tests.benchmarks.speed import machine
from tests.benchmarks.workloads import RECIPE, ROOT, WARM_UP, WORKLOADS

WAYS = {"bound": {}, "plain": {"OMP_PROC_BIND": "false"}}
PRODUCTS = "import torch\na = torch.randn(1024, 1024)\nwhile True: a @ a"
BESIDE = {"quiet": None, "loop": "while True: pass", "products": PRODUCTS, "run": None}
TICKS = os.sysconf("SC_CLK_TCK")


class Moment(NamedTuple):
    """When the log had so many steps; processor seconds so far, of everything and of what was started here."""

    steps: int
    seconds: float
    every: float
    own: float


class Speed(NamedTuple):
    tokens_per_s: float
    steps: int  # that counted
    others: float  # processor seconds that others took, per second


def measured(way: str, beside: str, dtype: str, steps: int, seconds: float) -> Speed:
    """One run of so many steps."""
    with tempfile.TemporaryDirectory() as folder, _beside(beside, way, dtype, Path(folder)) as others:
        run = _run(way, dtype, steps, Path(folder) / "run")
        try:
            moments = list(_watched(run, Path(folder) / "run" / "metrics.jsonl", steps, seconds, [run, *others]))
        finally:
            run.kill()
            run.wait()
        log = (Path(folder) / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    counted = [moment for moment in moments if moment.steps >= WARM_UP]
    if len(counted) < 2:
        return Speed(0.0, 0, 0.0)
    first, last = counted[0], counted[-1]
    events = [json.loads(line) for line in log[first.steps : last.steps]]
    taken = last.seconds - first.seconds
    rate = sum(event["tokens"] for event in events) / sum(event["seconds"] for event in events)
    return Speed(rate, len(events), (last.every - first.every - last.own + first.own) / taken)


def _run(way: str, dtype: str, steps: int, output: Path) -> subprocess.Popen[bytes]:
    sets = [*WORKLOADS["short"].overrides(steps, "cpu"), f"model.dtype={dtype}"]
    words = [word for override in sets for word in ("--set", override)]
    command = [*PEFTCTL, "--quiet", "train", str(RECIPE), *words, "--no-verify", "--output", str(output)]
    return _started(command, WAYS[way])


def _started(arguments: Sequence[str], own: dict[str, str]) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "MKL_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **own}
    nowhere = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=nowhere, stderr=nowhere)


@contextmanager
def _beside(name: str, way: str, dtype: str, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """What computes meanwhile; a run has as good as no end."""
    found: list[subprocess.Popen[bytes]] = []
    code = BESIDE[name]
    if code is not None:
        found.append(_started(["-c", code], {}))
    elif name == "run":
        found.append(_run(way, dtype, 100_000, folder / "beside"))
    try:
        yield found
    finally:
        for process in found:
            process.kill()
            process.wait()


def _watched(
    run: subprocess.Popen[bytes], log: Path, steps: int, most: float, ours: Sequence[subprocess.Popen[bytes]]
) -> Iterator[Moment]:
    """The moments at which the log has grown, until the run has ended or took too long after its first step."""
    seen, begun = 0, time.perf_counter()
    while seen < steps:
        now = time.perf_counter()
        count = log.read_bytes().count(b"\n") if log.exists() else 0
        if count > seen:
            begun = now if not seen else begun
            seen = count
            yield Moment(seen, now, _every(), sum(_taken(process.pid) for process in ours))
        elif now - begun > most:
            return
        elif run.poll() is not None:
            sys.exit(f"the run ended with {run.returncode} after {seen} of {steps} steps")
        time.sleep(0.01)


def _every() -> float:
    """Processor seconds of all processes since the machine's start."""
    user, nice, system, _, _, interrupts, soft = map(int, Path("/proc/stat").read_text("utf-8").split()[1:8])
    return (user + nice + system + interrupts + soft) / TICKS


def _taken(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text("utf-8").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=40.0, help="of a run at most, and for its start again as many")
    parser.add_argument("--dtype", default="auto", help="as model.dtype")
    parser.add_argument("--way", action="append", choices=WAYS)
    parser.add_argument("--beside", action="append", choices=BESIDE)
    given = parser.parse_args()
    print(machine(Setting(given.steps, os.cpu_count() or 1, "cpu")), flush=True)
    ways, beside = given.way or list(WAYS), given.beside or ["quiet", "loop", "products"]
    found: dict[tuple[str, str], list[float]] = {}
    for number in range(1, given.rounds + 1):
        for name in beside:
            for way in ways if number % 2 else reversed(ways):
                speed = measured(way, name, given.dtype, given.steps, given.seconds)
                found.setdefault((way, name), []).append(speed.tokens_per_s)
                print(
                    f"round {number}  {way:<6} {name:<9}{speed.tokens_per_s:>8.1f} tokens/s over {speed.steps} steps, "
                    f"others {speed.others:.2f}",
                    flush=True,
                )
    for (way, name), rates in found.items():
        quiet = found.get((way, "quiet"))
        share = f"  {median(rates) / median(quiet):.2f} of quiet" if quiet else ""
        print(f"median  {way:<6} {name:<9}{median(rates):>8.1f} tokens/s{share}")


if __name__ == "__main__":
    main()
