"""Run every test that is about a fault, slow ones too, and print the table. Ends with 1 when one failed."""

from __future__ import annotations

import sys

import pytest
from rich.console import Console

from tests.faults.table import Gathered

gathered = Gathered()
code = pytest.main(["-n", "0", "-m", "fault", "--no-header", *sys.argv[1:]], plugins=[gathered])
gathered.show(Console(width=160))
sys.exit(int(code))
