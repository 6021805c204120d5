"""How fast a run is while another process computes on the same processors.

Usage: python -m tests.benchmarks.busy [--rounds N] [--steps N] [--seconds S] [--dtype D] [--way WAY]... [--beside B]...

Each measurement is a process of its own, on the everyday recipe, with as many threads as there are processors; who
begins changes from round to round. The ways: `bound`, as peftctl binds its threads by itself, and `plain`, OpenMP's own
default. Beside it runs nothing (`quiet`), one Python loop (`loop`), products of matrices by as many threads as there
are processors (`products`), or the same run once more (`run`). A step counts from the third on, if nothing else on the
machine computed meanwhile; a run that takes longer than the seconds is ended, and what it did until then counts.
`others` is the processor time that neither the run nor what was put beside it took, per second. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

from tests.benchmarks.sides import PEFTCTL, Setting
from tests.benchmarks.speed import machine
from tests.benchmarks.workloads import RECIPE, ROOT, WARM_UP, WORKLOADS

WAYS = {"bound": {}, "plain": {"OMP_PROC_BIND": "false"}}
PRODUCTS = "import torch\na = torch.randn(1024, 1024)\nwhile True: a @ a"
BESIDE = {"quiet": None, "loop": "while True: pass", "products": PRODUCTS, "run": None}
START = 120.0  # seconds that a run may take until its first step
FOREIGN = 0.15  # of `others` that a step may have; clock ticks are as coarse as that
TICKS = os.sysconf("SC_CLK_TCK")


class Moment(NamedTuple):
    """When the log had so many steps; processor seconds so far, of everything and of what was started here."""

    steps: int
    seconds: float
    every: float
    own: float


class Step(NamedTuple):
    tokens: int
    seconds: float


class Speed(NamedTuple):
    steps: dict[int, Step]  # those that count, by number
    done: int  # after the first two
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
    spans = [span for span in pairwise(moments) if span[0].steps >= WARM_UP]
    clean = [span for span in spans if _others([span]) <= FOREIGN]
    events = [json.loads(line) for first, last in clean for line in log[first.steps : last.steps]]
    steps = {event["step"]: Step(event["tokens"], event["seconds"]) for event in events}
    return Speed(steps, sum(last.steps - first.steps for first, last in spans), _others(spans))


def rate(steps: Iterable[Step]) -> float:
    """Tokens a second."""
    tokens, seconds = zip(*steps, strict=True)
    return sum(tokens) / sum(seconds)


def typical(rounds: Sequence[Speed]) -> dict[int, Step]:
    """Of each step the median of its seconds over the rounds in which it counts."""
    numbers = sorted({number for speed in rounds for number in speed.steps})
    found = {number: [speed.steps[number] for speed in rounds if number in speed.steps] for number in numbers}
    return {number: Step(one[0].tokens, median(step.seconds for step in one)) for number, one in found.items()}


def ratio(one: dict[int, Step], other: dict[int, Step]) -> str:
    """Of two speeds, over the steps that both have: steps differ in their tokens."""
    both = one.keys() & other.keys()
    return f"{rate(one[n] for n in both) / rate(other[n] for n in both):.2f}" if both else "unknown"


def _others(spans: Sequence[tuple[Moment, Moment]]) -> float:
    """Processor seconds that neither the run nor what was put beside it took, per second."""
    own = sum(last.every - first.every - last.own + first.own for first, last in spans)
    return own / sum(last.seconds - first.seconds for first, last in spans) if spans else 0.0


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
        elif now - begun > (most if seen else START):
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
    parser.add_argument("--seconds", type=float, default=40.0, help="of a run at most, from its first step on")
    parser.add_argument("--dtype", default="auto", help="as model.dtype")
    parser.add_argument("--way", action="append", choices=WAYS)
    parser.add_argument("--beside", action="append", choices=BESIDE)
    given = parser.parse_args()
    print(machine(Setting(given.steps, os.cpu_count() or 1, "cpu")), flush=True)
    ways, beside = given.way or list(WAYS), given.beside or ["quiet", "loop", "products"]
    found: dict[tuple[str, str], list[Speed]] = {}
    for number in range(1, given.rounds + 1):
        for name in beside:
            for way in ways if number % 2 else reversed(ways):
                speed = measured(way, name, given.dtype, given.steps, given.seconds)
                found.setdefault((way, name), []).append(speed)
                said = f"{rate(speed.steps.values()):>8.1f} tokens/s" if speed.steps else "no step in time"
                counted = f"{len(speed.steps)} of {speed.done} steps"
                print(f"round {number}  {way:<6} {name:<9}{said}  {counted}, others {speed.others:.2f}", flush=True)
    medians = {key: typical(rounds) for key, rounds in found.items()}
    for (way, name), steps in medians.items():
        said = f"{rate(steps.values()):>8.1f} tokens/s over {len(steps)} steps" if steps else "no step in time"
        against = {f"{way} quiet": medians.get((way, "quiet")), f"plain {name}": medians.get(("plain", name))}
        ratios = [f"{ratio(steps, other)} of {key}" for key, other in against.items() if other and other is not steps]
        print("  ".join((f"median  {way:<6} {name:<9}{said}", *ratios)))


if __name__ == "__main__":
    main()
