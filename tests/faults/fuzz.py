"""Feed readers what strangers may write: python -m tests.faults.fuzz --minutes 5. Failures are shrunk, kept, printed.

What it once found lies in tests/faults/cases, where a test reads it again.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from tests.faults.targets import TARGETS, Failure, judge

EXAMPLES = 200  # of a target at a time
SHRINKING = 30.0  # seconds spent on making a failure smaller, after which other inputs pass for good


def examine(name: str, number: int, examples: int, folder: Path | None = None) -> tuple[int, Failure | None, bytes]:
    """How many inputs a target has read, and the smallest that it failed on. `number` is the seed."""
    count, last, failed, begun = 0, b"", dict[bytes, Failure](), 0.0

    @seed(number)
    @settings(
        max_examples=examples,
        database=None if folder is None else DirectoryBasedExampleDatabase(folder / "examples"),
        suppress_health_check=list(HealthCheck),
        deadline=None,
        phases=[Phase.reuse, Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(TARGETS[name].inputs)
    def read(data: bytes) -> None:
        nonlocal count, last, begun
        if data in failed:
            raise failed[data]
        if failed and time.monotonic() - begun > SHRINKING:
            return
        count += 1
        try:
            judge(name, data)
        except Failure as failure:
            begun = begun or time.monotonic()
            last, failed[data] = data, failure
            raise

    try:
        read()
    except Failure as failure:
        return count, failure, last
    return count, None, last


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="one of them, or several")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--folder", type=Path, default=Path(".cache/peftctl/fuzz"), help="where failures are kept")
    asked = parser.parse_args(arguments)
    names = asked.target or list(TARGETS)
    counts, failures, number = dict.fromkeys(names, 0), dict[str, Failure](), asked.seed
    end = time.monotonic() + 60 * asked.minutes
    while time.monotonic() < end and len(failures) < len(names):
        for name in (name for name in names if name not in failures):
            count, failure, data = examine(name, number, EXAMPLES, asked.folder)
            counts[name] += count
            if failure is not None:
                failures[name] = failure
                path = asked.folder / f"{name}-{hashlib.sha256(data).hexdigest()[:8]}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                print(f"{path}: {failure}\n  {data[:500]!r}")
        number += 1
    told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    print(f"{sum(counts.values()):,} inputs ({told}); {len(failures)} targets failed")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
