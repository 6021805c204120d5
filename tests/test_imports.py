"""The collector rests while libraries are imported, and only then."""

import subprocess
import sys

import pytest

CHECK = """
import gc
from peftctl.imports import importing
try:
    with importing():
        assert not gc.isenabled()
        import torch
        {then}
except ImportError:
    pass
assert gc.isenabled() and gc.get_freeze_count() > 100_000
with importing():
    assert gc.isenabled(), "torch is there already"
"""


@pytest.mark.parametrize("then", ["pass", "import peftctl_has_no_such_module"])
def test_the_collector_rests_while_torch_is_imported_for_the_first_time(then: str) -> None:
    subprocess.run([sys.executable, "-c", CHECK.format(then=then)], check=True)


OFF = """
import gc
from peftctl.imports import importing
gc.disable()
with importing():
    pass
assert not gc.isenabled()
"""


def test_whoever_switched_the_collector_off_keeps_it_off() -> None:
    subprocess.run([sys.executable, "-c", OFF], check=True)


DRAWN = """
import random
from peftctl.imports import undrawn
random.seed(0)
state = random.getstate()
assert undrawn("sklearn.metrics").accuracy_score and state == random.getstate()
"""


def test_an_import_draws_nothing() -> None:
    """scikit-learn's does by itself: the first evaluation of a run would move what comes after it."""
    subprocess.run([sys.executable, "-c", DRAWN], check=True)
