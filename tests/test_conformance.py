"""The counts that papers print: each base and each row by its own formula, and what differs is known to differ."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import conformance
from tests.conformance import REFUSED, ROOT, ROWS, TOTALS, Row, Total


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the tables of all bases."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFTCTL_CACHE", str(folder))
        yield folder


@pytest.mark.parametrize("total", TOTALS, ids=lambda total: f"{total.base}{'-pooler' * bool(total.beside)}")
def test_a_base_has_as_many_parameters_as_published(total: Total) -> None:
    assert total.counted() + total.beside == total.expected
    assert (f"{total.expected:,}" == total.published) is (total.why == "")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.base}-{row.called}-{row.published}")
def test_a_count_is_what_the_formula_gives(row: Row) -> None:
    counted = row.counted()
    assert counted == row.expected
    assert row.matches(counted) is (row.why == "")


@pytest.mark.parametrize("base", REFUSED)
def test_what_is_not_served_is_refused_in_one_line(base: str) -> None:
    said = conformance.refusal(base)
    assert base in said and "\n" not in said and len(said) < 200


def test_the_table_shows_every_row_and_needs_no_torch(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conformance.main()
    shown = capsys.readouterr().out
    assert shown.count("matches") == sum(not known.why for known in [*TOTALS, *ROWS])
    assert all(known.why in shown for known in [*TOTALS, *ROWS])
    code = (
        "import sys; from tests import conformance as c; c.REFUSED.clear(); c.main(); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PEFTCTL_CACHE": str(kept)}
    again = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert again.stdout.splitlines()[: len(TOTALS) + len(ROWS) + 1] == shown.splitlines()[: len(TOTALS) + len(ROWS) + 1]


def test_the_page_says_how_many_match() -> None:
    known = [*TOTALS, *ROWS]
    matching = sum(not one.why for one in known)
    said = f"prints {len(known)} published counts beside ours. {matching} are ours"
    assert said in (ROOT / "README.md").read_text("utf-8")
