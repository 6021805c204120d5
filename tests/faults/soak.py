"""Kill runs again and again: python -m tests.faults.soak --trials 50 --log FILE adds to the log and prints its sums.

Trials are numbered, and a trial's number is its seed, so that one that failed can be had again: --only NUMBER.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from tests.faults.trials import Outcome, Whole, jobs, trial, whole


def soak(numbers: Iterable[int], folder: Path) -> Iterator[Outcome]:
    """The trials of these numbers, over all jobs in turn."""
    named, done = jobs(), dict[str, Whole]()
    names = sorted(named)
    for number in numbers:
        name = names[number % len(names)]
        done[name] = done.get(name) or whole(name, named[name], folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f"{number}-") as own:
            yield trial(number, done[name], Path(own))


def summary(outcomes: Sequence[Outcome]) -> str:
    """What all trials came to, in a line."""
    ends = Counter(code for outcome in outcomes for code in outcome.ends)
    told = ", ".join(f"{code}: {count}" for code, count in sorted(ends.items()))
    return (
        f"{len(outcomes)} trials, {sum(outcome.kills for outcome in outcomes)} ends by force (exit codes {told}); "
        f"checkpoints lost {sum(outcome.lost for outcome in outcomes)}; "
        f"unequal resumes {sum(outcome.unequal for outcome in outcomes)}; "
        f"trials with any fault {sum(bool(outcome.faults) for outcome in outcomes)}"
    )


def _read(log: Path) -> list[Outcome]:
    lines = log.read_text("utf-8").splitlines() if log.exists() else []
    return [Outcome(**json.loads(line)) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50, help="how many to add")
    parser.add_argument("--log", type=Path, default=Path(".cache/peftctl/soak.jsonl"), help="one trial a line")
    parser.add_argument("--only", type=int, help="this trial alone, unlogged")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    known = _read(asked.log)
    numbers = range(len(known), len(known) + asked.trials) if asked.only is None else [asked.only]
    asked.log.parent.mkdir(parents=True, exist_ok=True)
    begun, added = time.monotonic(), 0
    with tempfile.TemporaryDirectory(dir=asked.log.parent, prefix="soak-") as folder:
        for outcome in soak(numbers, Path(folder)):
            added += 1
            if asked.only is None:
                with asked.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(outcome._asdict()) + "\n")
            if outcome.faults or asked.only is not None:
                print(outcome)
    print(f"{added} trials in {time.monotonic() - begun:.0f} s")
    outcomes = _read(asked.log)
    if outcomes:
        print(f"all: {summary(outcomes)}")
        for kind in sorted({outcome.kind for outcome in outcomes}):
            print(f"  {kind}: {summary([outcome for outcome in outcomes if outcome.kind == kind])}")
    sys.exit(any(outcome.faults for outcome in outcomes))


if __name__ == "__main__":
    main()
