"""Run the tests that are about a fault, slow ones too, and print the table. Ends with 1 when one failed.

Those marked `hundreds` are left to `make test-all`: each fault they are about has others here.
"""

from __future__ import annotations

import sys

import pytest
from rich.console import Console

from tests.faults.table import Gathered

gathered = Gathered()
code = pytest.main(["-m", "fault and not hundreds", "--no-header", *sys.argv[1:]], plugins=[gathered])
gathered.show(Console(width=160))
sys.exit(int(code) or not gathered.green())
