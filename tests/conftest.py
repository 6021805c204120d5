"""What every test shares: one thread, so that sums do not depend on the machine's load."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

# how fast a loaded machine draws examples says nothing about the code
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
