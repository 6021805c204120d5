"""Runs that keep what the frozen blocks answer: the same results, the same bits however they were stopped, no second
pass over the data, and nothing stale."""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from peftctl import kept, reuse, run
from peftctl.errors import Stopped
from peftctl.plan import Options
from peftctl.policy import Policy
from peftctl.states import STATES, Store
from tests import runs

# 6 steps, of which some span two epochs
EPOCHS = {"max_steps": None, "epochs": 3, "save_every": 1, "keep": 9, "pack_weights": False, "cache_reference": False}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reuse, "GROUP", 200)  # tokens, so that there are several groups
    return tmp_path / "cache" / "frozen"


@pytest.fixture
def deep(tmp_path: Path) -> dict[str, Any]:
    """A base with four layers."""
    settings = json.loads((runs.CONFIGS / "models" / "tiny-llama.json").read_text())
    (tmp_path / "deep.json").write_text(json.dumps(settings | {"num_hidden_layers": 4}))
    return {"name": str(tmp_path / "deep.json")}


def contents(model: dict[str, Any], objective: str = "sft", /, **train: Any) -> dict[str, Any]:
    return runs.document("lora", objective, model=model, method={"layers": [2, 3]}, train=EPOCHS | train)


def chosen(output: Path) -> int:
    count: int = json.loads((output / "run.json").read_text())["choices"]["frozen_blocks"]
    return count


def losses(output: Path) -> list[float]:
    return [event.get("loss", event.get("validation_loss")) for event in runs.events(output)]


@contextmanager
def counted(dies_at: int | None = None) -> Iterator[list[int]]:
    """The groups that are computed within; the process dies before it writes one of them, counted from 1."""
    written: list[int] = []
    write = Store.write

    def writing(self: Store, part: int, content: bytes) -> None:
        if len(written) + 1 == dies_at:
            raise runs.Killed
        written.append(part)
        write(self, part, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "write", writing)
        yield written


@contextmanager
def attentions() -> Iterator[list[int]]:
    """How many attentions each pass of the loop asks for."""
    calls: list[int] = []
    tokens = Policy.tokens

    def asking(self: Policy, batch: Any, *wanted: Any, **more: Any) -> Any:
        answer = tokens(self, batch, *wanted, **more)
        calls.append(self.attention_calls)
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "tokens", asking)
        yield calls


def _assert_equal(one: Path, other: Path) -> None:
    assert runs.untimed(one) == runs.untimed(other)
    assert runs.bits(one) == runs.bits(other)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_the_losses_are_those_of_a_run_that_computes_all(
    objective: str, deep: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    runs.train(tmp_path / "plain", contents(deep, objective, cache_frozen=False))
    assert chosen(tmp_path / "plain") == 0
    assert not cache.exists()
    with attentions() as calls:
        proof = runs.train(tmp_path / "kept", contents(deep, objective), verify=True)["proof"]
    assert chosen(tmp_path / "kept") == 2
    # 2 of 4 blocks, in training and evaluation, for policy and reference; all in the proof at the end
    assert set(calls[:-2]) == {2} and calls[-2:] == [4, 4]
    assert proof["max_difference"] == 0
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_killed_anywhere_equals_never_killed(
    objective: str, deep: dict[str, Any], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = contents(deep, objective)
    recipe["method"] |= {"dropout": 0.1}
    runs.train(tmp_path / "whole", recipe)
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path / "another"))
    output = tmp_path / "killed"
    with counted(dies_at=2) as written, pytest.raises(runs.Killed):
        runs.train(output, recipe)
    assert len(written) == 1
    with counted() as rest, runs.killed_in(5), pytest.raises(runs.Killed):
        runs.train(output, recipe, resume=True)
    assert rest and not set(rest) & set(written)
    with runs.stopped_after(4, output), pytest.raises(Stopped):
        runs.train(output, recipe, resume=True)
    # what was kept is gone: it is computed again, to the same bits
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path / "third"))
    runs.train(output, recipe, resume=True)
    _assert_equal(tmp_path / "whole", output)


def test_stopped_while_computing_equals_never_stopped(
    deep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.train(tmp_path / "whole", contents(deep))
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path / "another"))
    with (
        runs.stopped_after(0, tmp_path / "cut"),
        counted() as written,
        pytest.raises(Stopped, match="before the first"),
    ):
        runs.train(tmp_path / "cut", contents(deep))
    assert not written and chosen(tmp_path / "cut") == 2
    runs.train(tmp_path / "cut", contents(deep), resume=True)
    _assert_equal(tmp_path / "whole", tmp_path / "cut")


def test_recomputing_blocks_changes_no_bit(deep: dict[str, Any], tmp_path: Path) -> None:
    runs.train(tmp_path / "one", contents(deep))
    runs.train(tmp_path / "two", contents(deep, gradient_checkpointing=True))
    assert chosen(tmp_path / "two") == 2
    assert runs.untimed(tmp_path / "one") == runs.untimed(tmp_path / "two")


def test_a_second_run_computes_nothing_again(deep: dict[str, Any], tmp_path: Path) -> None:
    with counted() as written:
        runs.train(tmp_path / "first", contents(deep))
    assert len(written) > 1
    with counted() as again:
        runs.train(tmp_path / "second", contents(deep, learning_rate=0.01))
        runs.train(tmp_path / "third", contents(deep, epochs=1))  # one epoch keeps nothing and uses nothing
        runs.train(tmp_path / "fourth", contents({"name": str(tmp_path / "first" / "base")}))  # the same, by its folder
    assert not again
    assert [chosen(tmp_path / name) for name in ("second", "third", "fourth")] == [2, 0, 2]
    _assert_equal(tmp_path / "first", tmp_path / "second")


@pytest.mark.parametrize(
    "blocks",
    [
        {"model": {"dtype": "bfloat16"}},
        {"train": {"seed": 1}},  # another random base
        {"train": {"fuse": False}},
        {"train": {"pack_weights": True}},
        {"data": {"limit": 8}},
        {"data": {"share_starts": False}},
        {"method": {"layers": [3]}},
        {"model": {"layout": "joined"}},
    ],
    ids=lambda blocks: str(next(iter(blocks.values()))),
)
def test_what_is_kept_serves_the_same_job_only(
    blocks: dict[str, Any], deep: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    runs.train(tmp_path / "first", contents(deep))
    other = contents(deep)
    other = {key: value | blocks[key] if key in blocks else value for key, value in other.items()}
    with counted() as written:
        runs.train(tmp_path / "second", other)
    assert written and len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(("layer", "anew"), [(1, True), (3, False)])
def test_changed_weights_are_noticed_wherever_they_lie(
    layer: int, anew: bool, deep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.train(tmp_path / "first", contents(deep))
    base = {"name": str(tmp_path / "first" / "base")}
    monkeypatch.setattr("peftctl.base.fingerprint", lambda base: "a sample of the files that does not see the change")
    runs.train(tmp_path / "second", contents(base))
    file = tmp_path / "first" / "base" / "model.safetensors"
    weights = load_file(file)
    weights[f"model.layers.{layer}.mlp.up_proj.weight"][7, 7] += 1
    save_file(weights, file, metadata={"format": "pt"})
    with counted() as written:
        runs.train(tmp_path / "third", contents(base))
    assert bool(written) == anew


@pytest.mark.parametrize("name", [STATES, "index"])
def test_a_torn_file_is_recovered_from(name: str, deep: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    with counted() as every:
        runs.train(tmp_path / "first", contents(deep))
    (folder,) = cache.iterdir()
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with counted() as written:
        runs.train(tmp_path / "second", contents(deep))
    assert 0 < len(written) < len(every)
    assert (folder / name).read_bytes() == content
    _assert_equal(tmp_path / "first", tmp_path / "second")


@pytest.mark.parametrize(
    "blocks",
    [
        {"method": {"layers": [0, 3]}},
        {"method": {"layers": None}},
        {"train": {"epochs": 1}},
        {"model": {"layout": "padded"}},
    ],
    ids=["block 0", "every block", "one epoch", "padded"],
)
def test_nothing_is_kept_where_it_is_of_no_use(
    blocks: dict[str, Any], deep: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    recipe = contents(deep)
    recipe = {key: value | blocks[key] if key in blocks else value for key, value in recipe.items()}
    runs.train(tmp_path / "run", recipe)
    assert chosen(tmp_path / "run") == 0 and not cache.exists()


def test_a_run_goes_on_as_it_began(deep: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    runs.train(tmp_path / "run", contents(deep, epochs=1))
    runs.train(tmp_path / "run", contents(deep), resume=True)
    assert chosen(tmp_path / "run") == 0 and not cache.exists()


def test_base_dropout_forbids_it_and_a_notice_says_so(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = json.loads((runs.CONFIGS / "models" / "tiny-gpt2.json").read_text())
    (tmp_path / "gpt2.json").write_text(json.dumps(settings | {"n_layer": 3}))
    recipe = contents({"name": str(tmp_path / "gpt2.json")})
    recipe["method"] |= {"layers": [2], "target_modules": "all-linear"}
    _loudly(tmp_path / "run", recipe)
    assert "the lower 2 of 3 blocks are computed at every step: the base has dropout" in capsys.readouterr().err
    assert chosen(tmp_path / "run") == 0 and not cache.exists()
    recipe["train"] |= {"cache_frozen": False}
    runs.train(tmp_path / "never", recipe)
    _assert_equal(tmp_path / "run", tmp_path / "never")  # to try drew on no random number of the run's


def test_without_room_or_rights_the_run_goes_on(
    deep: dict[str, Any], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    runs.train(tmp_path / "plain", contents(deep, cache_frozen=False))
    with monkeypatch.context() as patch:
        patch.setattr(kept, "disk_usage", lambda path: namedtuple("Usage", "free")(4000))
        _loudly(tmp_path / "full", contents(deep))
    assert "4,000 free" in capsys.readouterr().err
    assert not cache.exists()
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("in the way")
    _loudly(tmp_path / "refused", contents(deep))
    assert "computed at every step" in capsys.readouterr().err
    for name in ("full", "refused"):
        assert chosen(tmp_path / name) == 0
        assert runs.bits(tmp_path / name) == runs.bits(tmp_path / "plain")


def test_what_was_used_longest_ago_goes_first(
    deep: dict[str, Any], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.train(tmp_path / "first", contents(deep))
    (first,) = cache.iterdir()
    size = sum(path.stat().st_size for path in first.iterdir())
    monkeypatch.setattr(kept, "LARGEST", size * 5 // 2)
    runs.train(tmp_path / "second", contents(deep, seed=1))
    runs.train(tmp_path / "again", contents(deep))
    runs.train(tmp_path / "third", contents(deep, seed=2))
    assert first in cache.iterdir() and len(list(cache.iterdir())) == 2


def _loudly(output: Path, recipe: dict[str, Any]) -> None:
    run.train(runs.loaded(output, recipe), Options(verify=False))
