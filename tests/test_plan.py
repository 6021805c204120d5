"""What a plan refuses before a weight is read."""

import json
from pathlib import Path

import pytest

from peftctl import recipe
from peftctl.errors import DataError
from peftctl.plan import Options, plan
from tests import runs

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


@pytest.mark.parametrize("method", ["prefix", "prompt", "p-tuning"])
def test_virtual_tokens_take_positions_too(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path / "cache"))
    longest = plan(runs.loaded(tmp_path / "any", runs.document()), Options()).data.report.longest
    small = json.loads((CONFIGS / "models" / "tiny-gpt2.json").read_text()) | {"n_positions": longest + 2}
    (tmp_path / "small.json").write_text(json.dumps(small))

    def planned(tokens: int) -> None:
        blocks = {"model": {"name": str(tmp_path / "small.json")}, "method": {"num_virtual_tokens": tokens}}
        plan(runs.loaded(tmp_path / "run", runs.document(method, **blocks)), Options())

    planned(2)
    with pytest.raises(DataError, match=f"3 of them for virtual tokens; set data.max_length to at most {longest - 1},"):
        planned(3)
