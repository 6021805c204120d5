"""How fast peftctl trains, against TRL + peft and against the machine.

Usage: python -m tests.benchmarks.speed [--workload NAME]... [--rounds N] [--steps N] [--threads N] [--device D]
       python -m tests.benchmarks.speed --peer WAY ... | --list | --preference | --growth | --ablation | --start-up

Each side is a process of its own, in turn, round after round; who begins changes from round to round. Both get the
same encoded rows with the same labels in the same order, the same rank, optimizer, rate, dtype and threads. The peer
may go about it in several ways (peer.py, VARIANTS): the first round tries them all, and the fastest goes on.

Of ours, a step's seconds and tokens are read from metrics.jsonl, which `peftctl train` writes; of the peer, they are
taken by a callback at the begin and the end of a step. The first two steps are left out. The loss on held-out rows is
measured by `peftctl eval` for both adapters.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tests.benchmarks import studies
from tests.benchmarks.machine import machine
from tests.benchmarks.sides import OURS, WAYS, Measured, Setting, ceiling, measured, peers
from tests.benchmarks.start_up import start_up
from tests.benchmarks.workloads import DEFAULT, PREFERENCE, WARM_UP, WORKLOADS, Workload, available_memory


class Round(NamedTuple):
    ours: Measured
    theirs: Measured


class Comparison(NamedTuple):
    workload: Workload
    rounds: list[Round]
    ceiling: dict[str, Any]

    def share(self) -> float:
        """The time that the matrix products alone would take, of the time that our warm steps took."""
        flops = self.ceiling["flops"]
        warm = flops[self.workload.warm(len(flops))]
        return sum(warm) / self.ceiling["gemm_flops_per_s"] / (median(r.ours.step_s for r in self.rounds) * len(warm))

    def document(self) -> dict[str, Any]:
        """All that was measured."""
        rounds = [{"ours": r.ours._asdict(), "theirs": r.theirs._asdict()} for r in self.rounds]
        return {"workload": self.workload.name, "rounds": rounds, "gemm_share": self.share(), **self.ceiling}


def compare(group: Sequence[Workload], setting: Setting, rounds: int, wanted: Sequence[str] = ()) -> list[Comparison]:
    """Ours at each workload of a group, which have the same rows, and the peer at the first of them.

    `wanted`: the ways of the peer to measure, where an earlier run has told the fastest.
    """
    every = peers(group[0], setting.device)
    variants = [way for way in every if way in wanted] or list(every)
    rows: list[list[Round]] = []
    for number in range(1, rounds + 1):
        ours, theirs = [(OURS, workload) for workload in group], [(way, group[0]) for way in variants]
        order = [*ours, *theirs] if number % 2 else [*theirs, *ours]
        found = {(side, w.name): _shown(number, w, measured(side, w, setting)) for side, w in order}
        if len({each.tokens for each in found.values()}) > 1:
            raise SystemExit(f"{group[0].name}: the sides did not see the same tokens: {found}")
        fastest = max((found[way, group[0].name] for way in variants), key=lambda each: each.tokens_per_s)
        variants = [fastest.side]
        rows.append([Round(found[OURS, workload.name], fastest) for workload in group])
    return [
        Comparison(w, list(done), ceiling(w, setting)) for w, done in zip(group, zip(*rows, strict=True), strict=True)
    ]


def _shown(number: int, workload: Workload, found: Measured) -> Measured:
    loss = "" if found.loss is None else f"  held-out loss {found.loss:.4f}"
    pairs = "" if found.pairs_per_s is None else f"{found.pairs_per_s:>7.2f} pairs/s"
    print(
        f"{workload.name:<20}round {number}  {found.side:<22}{found.tokens_per_s:>9.1f} tokens/s{pairs}"
        f"{found.process_s:>8.1f} s{found.peak_bytes / 1e9:>7.2f} GB{loss}",
        flush=True,
    )
    return found


def table(comparisons: list[Comparison]) -> str:
    """Medians over the rounds, as Markdown; ratios are ours to theirs, round by round."""
    head = (
        "workload",
        "peer",
        "tokens/s",
        "pairs/s",
        "ratios",
        "median",
        "process s",
        "ratio",
        "peak GB",
        "ratio",
        "loss",
        "GEMM",
    )
    lines = [head, ("---",) * len(head), *map(_line, comparisons)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _line(found: Comparison) -> tuple[str, ...]:
    def both(name: str, scale: float, digits: int) -> str:
        ours, theirs = (
            median(getattr(side, name) for side in sides) * scale for sides in zip(*found.rounds, strict=True)
        )
        return f"{ours:.{digits}f} / {theirs:.{digits}f}"

    def ratios(name: str) -> list[float]:
        return [getattr(r.ours, name) / getattr(r.theirs, name) for r in found.rounds]

    first = found.rounds[0]
    return (
        found.workload.name,
        first.theirs.side,
        both("tokens_per_s", 1, 0),
        "-" if first.ours.pairs_per_s is None else both("pairs_per_s", 1, 2),
        " ".join(f"{ratio:.2f}" for ratio in ratios("tokens_per_s")),
        f"{median(ratios('tokens_per_s')):.2f}",
        both("process_s", 1, 1),
        f"{median(ratios('process_s')):.2f}",
        both("peak_bytes", 1e-9, 2),
        f"{median(ratios('peak_bytes')):.2f}",
        "-" if first.ours.loss is None else both("loss", 1, 4),
        f"{found.share():.0%}",
    )


def fits(workload: Workload) -> bool:
    free = available_memory()
    if free is None or free >= workload.memory:
        return True
    print(f"{workload.name}: left out, as it may need {workload.memory / 1e9:.0f} GB and {free / 1e9:.1f} are free")
    return False


def main() -> None:
    given = _parsed()
    if given.list:
        print("\n".join(f"{w.name:<20}{w.about}" for w in WORKLOADS.values()))
        return
    setting = Setting(given.steps, given.threads, given.device)
    print(machine(setting.threads, setting.device), flush=True)
    names = given.workload or DEFAULT[given.device]
    if given.start_up:
        return start_up(setting, given.rounds)
    if given.growth:
        return studies.growth(setting, given.rounds)
    if given.ablation:
        return studies.ablation(names, setting, given.rounds, given.switch)
    comparisons = []
    for group in _groups(names, given.preference):
        own = setting._replace(steps=min(given.steps, group[0].steps or given.steps))
        studies.prepare(group, own)
        comparisons += compare(group, own, given.rounds, given.peer)
    print(f"\n{table(comparisons)}")
    if given.output:
        documents = [comparison.document() for comparison in comparisons]
        given.output.write_text(
            json.dumps({"machine": machine(setting.threads, setting.device), "workloads": documents}, indent=2)
        )


def _groups(names: Sequence[str], preference: bool) -> list[list[Workload]]:
    """What is measured beside one run of the peer, as far as memory allows."""
    groups = [group for group in PREFERENCE if set(group) & set(names)] or PREFERENCE
    wanted = groups if preference else [[name] for name in names]
    return [group for group in ([w for w in map(WORKLOADS.__getitem__, own) if fits(w)] for own in wanted) if group]


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--workload", action="append", choices=WORKLOADS, help="may be repeated")
    parser.add_argument("--list", action="store_true", help="the workloads there are")
    parser.add_argument("--growth", action="store_true", help="our own time against the size of the job")
    parser.add_argument(
        "--preference", action="store_true", help="pairs: sharing on and off, a first and a second epoch"
    )
    parser.add_argument("--ablation", action="store_true", help="our own time with each switch off")
    parser.add_argument("--switch", action="append", metavar="NAME", help="of --ablation this one; may be repeated")
    parser.add_argument("--start-up", action="store_true", help="our time to the first step against a mere import")
    parser.add_argument("--peer", action="append", default=[], choices=WAYS, help="of its ways this one alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help=f"of which the first {WARM_UP} do not count")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=DEFAULT, default="cpu")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="all that was measured")
    given = parser.parse_args()
    if given.steps <= WARM_UP:
        parser.error(f"--steps: more than {WARM_UP} are needed, for the first {WARM_UP} do not count")
    return given


if __name__ == "__main__":
    main()
