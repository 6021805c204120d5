"""The same readers, fed by atheris, which looks at what code an input reaches: python -m tests.faults.guided rows 300

It needs `pip install atheris`, which has wheels for Linux and macOS and some versions of Python.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings

FOLDER = Path(".cache/peftctl/fuzz")
SEEDS = 30  # inputs of hypothesis that it begins with


def main(name: str, seconds: str) -> None:
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed, or has no wheel for this Python; make fuzz does without")
    with atheris.instrument_imports(include=["peftctl"]):
        from tests.faults.targets import TARGETS, judge

    corpus, found = FOLDER / f"corpus-{name}", FOLDER / f"{name}-"
    corpus.mkdir(parents=True, exist_ok=True)

    @settings(
        max_examples=SEEDS,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(TARGETS[name].inputs)
    def keep(data: bytes) -> None:
        with suppress(OSError):
            (corpus / str(abs(hash(data)))).write_bytes(data)

    keep()
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={found}", "-rss_limit_mb=0", "-timeout=60"]
    atheris.Setup([sys.argv[0], str(corpus), *options], lambda data: judge(name, data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
