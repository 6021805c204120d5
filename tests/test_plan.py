"""What a plan refuses before a weight is read."""

import json
from pathlib import Path

import pytest

from peftctl import recipe
from peftctl.errors import DataError
from peftctl.plan import Options, plan

CONFIGS = Path(__file__).parents[1] / "configs"


def test_rows_beyond_the_bases_positions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path / "cache"))
    small = json.loads((CONFIGS / "models" / "tiny-gpt2.json").read_text()) | {"n_positions": 40}
    (tmp_path / "small.json").write_text(json.dumps(small))
    smoke = CONFIGS.parent / "recipes" / "smoke.yaml"
    wanted = recipe.load(smoke, [f"model.name={tmp_path / 'small.json'}"])
    with pytest.raises(
        DataError, match=r"messages.jsonl: the longest row has \d+ tokens, the base has positions for 40"
    ):
        plan(wanted, Options())
    assert plan(recipe.load(smoke), Options()).data.report.longest > 40
