"""Runs that remember their reference: the same results, the same bits however they were stopped, and nothing stale."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from peftctl import remembered
from peftctl.errors import Stopped
from peftctl.kept import rows_key
from peftctl.policy import Reference
from peftctl.row import Row
from peftctl.states import STATES, Store
from tests import runs

EPOCHS = {"max_steps": None, "epochs": 3, "save_every": 1, "keep": 9, "pack_weights": False}
OBJECTIVES = ["dpo", "ipo", "kto"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "GROUP", 200)  # tokens, so that there are several groups
    return tmp_path / "cache" / "references"


def contents(objective: str = "dpo", **train: Any) -> dict[str, Any]:
    return runs.document("lora", objective, train=EPOCHS | train)


def losses(output: Path) -> list[float]:
    return [event.get("loss", event.get("validation_loss")) for event in runs.events(output)]


def chosen(output: Path) -> bool:
    found: bool = json.loads((output / "run.json").read_text())["choices"]["remembered_reference"]
    return found


@contextmanager
def asked() -> Iterator[list[int]]:
    """How often the reference is really computed, and the groups that are written."""
    computed: list[int] = []
    as_it_was = Reference._as_it_was

    def asking(self: Reference) -> Any:
        computed.append(1)
        return as_it_was(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reference, "_as_it_was", asking)
        yield computed


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_same_results_with_one_pass_over_the_data(objective: str, tmp_path: Path) -> None:
    with asked() as plain:
        runs.train(tmp_path / "plain", contents(objective, cache_reference=False))
    with asked() as once:
        runs.train(tmp_path / "kept", contents(objective))
    with asked() as never:
        runs.train(tmp_path / "again", contents(objective))
    assert len(plain) > len(once) > 0 and not never
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4, abs=1e-5)
    assert runs.bits(tmp_path / "again") == runs.bits(tmp_path / "kept")
    assert chosen(tmp_path / "kept") and not chosen(tmp_path / "plain")


def test_one_epoch_computes_it_as_it_goes(cache: Path, tmp_path: Path) -> None:
    runs.train(tmp_path / "run", contents(epochs=1))
    assert not chosen(tmp_path / "run") and not cache.exists()


@pytest.mark.parametrize("step", [1, 3, 5])
def test_stopped_and_gone_on_with_equals_never_stopped(step: int, tmp_path: Path) -> None:
    runs.train(tmp_path / "whole", contents())
    with runs.stopped_after(step, tmp_path / "cut"), pytest.raises(Stopped):
        runs.train(tmp_path / "cut", contents())
    runs.train(tmp_path / "cut", contents(), resume=True)
    assert runs.bits(tmp_path / "cut") == runs.bits(tmp_path / "whole")


def test_killed_while_it_is_computed_equals_never_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.train(tmp_path / "whole", contents())
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path / "other"))
    write, written = Store.write, []

    def dying(self: Store, part: int, content: bytes) -> None:
        if written:
            raise runs.Killed
        written.append(part)
        write(self, part, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "write", dying)
        with pytest.raises(runs.Killed):
            runs.train(tmp_path / "cut", contents())
    runs.train(tmp_path / "cut", contents(), resume=True)
    assert runs.bits(tmp_path / "cut") == runs.bits(tmp_path / "whole")


@pytest.mark.parametrize("change", ["seed", "method", "data", "reference"])
def test_another_reference_is_computed_anew(change: str, tmp_path: Path) -> None:
    blocks = contents()
    runs.train(tmp_path / "first", blocks)
    if change == "reference":  # what it started from, in the place of the base
        blocks["method"]["init_from"] = str(tmp_path / "first" / "adapter")
    with asked() as computed:
        other = {
            "seed": contents(seed=5),  # other held-out rows
            "method": blocks | {"method": blocks["method"] | {"rank": 2}},
            "data": blocks | {"data": blocks["data"] | {"limit": 6}},
            "reference": blocks,
        }[change]
        runs.train(tmp_path / "second", other)
    # by the switch another rank has the same reference: the base
    assert bool(computed) is (change != "method")


def test_a_damaged_file_is_mended(cache: Path, tmp_path: Path) -> None:
    runs.train(tmp_path / "first", contents())
    (states,) = cache.rglob(STATES)
    states.write_bytes(states.read_bytes()[:-5] + b"12345")
    with asked() as computed:
        runs.train(tmp_path / "second", contents())
    assert len(computed) == 1
    assert runs.bits(tmp_path / "second") == runs.bits(tmp_path / "first")


def test_rows_with_other_labels_groups_or_sharing_are_others() -> None:
    one, two = Row((1, 2, 3), (0.0, 1.0, 1.0)), Row((1, 2, 3), (0.0, 0.0, 1.0))
    keys = [rows_key([[one]], "all"), rows_key([[two]], "all"), rows_key([[one]], "none")]
    keys += [rows_key([[one, two]], "all"), rows_key([[one], [two]], "all")]
    assert len(set(keys)) == len(keys)
