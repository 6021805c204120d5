"""What every test shares: one thread, so that sums do not depend on the machine's load."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.faults.catalog import NUMBERS

# how fast a loaded machine draws examples says nothing about the code
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests say which faults they are about. Those that need a card are skipped where there is none."""
    for item in items:
        numbers = [number for mark in item.iter_markers("fault") for number in mark.args]
        item.user_properties += [("fault", NUMBERS[number].number) for number in numbers]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
