"""What a method's block may get wrong is one line and exit code 2, before a weight is read: by command, all methods."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peftctl import cli, methods
from tests import runs
from tests.methods.tables import LLAMA

NUMBERS = ("rank", "initial_rank", "num_virtual_tokens", "width", "phm_dim", "hidden_size", "last_layers")
# of no module, of the head alone, of containers, of what is no linear, of a name that is mistyped, of nothing
TARGETS: tuple[Any, ...] = ("nothing.*", "(", "", ".*lm_head", ["mlp"], ["self_attn"], ["model"], ["q_prj"], [""], [])


def wrong(name: str) -> Iterator[dict[str, Any]]:
    """Blocks of a method that nothing can be made of."""
    known = methods.get(name).config.model_fields
    yield from ({key: value} for key in NUMBERS if key in known for value in (0, -1))
    yield from ({key: 100_000} for key in ("rank", "initial_rank") if key in known and name != "vera")
    yield from ({"dropout": value} for value in (1, 1.0, -0.1) if "dropout" in known)
    for key in ("target_modules", "feedforward_modules"):
        # of these, [] is a choice
        yield from ({key: value} for value in TARGETS if key in known and (name != "ia3" or value != []))
    yield from ({"layers": value} for value in ([99], [-1], []) if "layers" in known)
    yield from ({"save_modules": value} for value in (["nothing"], ["act_fn"], [], [""]))
    yield {"init_from": "/nowhere"}
    yield {"unknown": 1}


@pytest.mark.fault(31)
@pytest.mark.parametrize("name", methods.names())
def test_is_one_line_and_nothing_is_made(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"model": {"task": "sequence-classification"}} if name == "head" else {}
    contents = runs.document(name, "classification" if asked else "sft", **asked)
    for keys in wrong(name):
        contents["method"] = {"name": name, **({"add_missing": True} if name == "bitfit" else {}), **keys}
        path = runs.written(tmp_path / "run", contents)
        with pytest.raises(SystemExit) as left:
            cli.main(["train", str(path)])
        said = capsys.readouterr()
        lines = said.err.splitlines()
        assert left.value.code == 2 and len(lines) == 1 and said.out == "", (keys, lines)
        assert lines[0].startswith("peftctl: error: ") and next(iter(keys)).split(".")[-1][:4] in lines[0], json.dumps(
            lines
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "adalora", "ia3", "full"])
def test_the_head_alone_is_a_choice_only_by_its_name(name: str) -> None:
    method, keys = methods.get(name), {"feedforward_modules": []} if name == "ia3" else {}
    places = method.count(LLAMA, method.config(name=name, target_modules=["lm_head"], **keys)).places
    assert "lm_head" in places


@pytest.mark.parametrize(
    ("name", "target", "other"),
    [
        ("lora", "wte", "lm_head"),
        *((name, "lm_head", "transformer.wte") for name in ("lora", "dora", "vera", "adalora", "ia3")),
    ],
)
def test_one_of_two_tied_weights_is_refused(
    name: str, target: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = runs.document(name, model={"name": str(runs.CONFIGS / "models/tiny-gpt2.json")})
    contents["method"] = {"name": name, "target_modules": [target]}
    contents["method"] |= {"feedforward_modules": []} if name == "ia3" else {}
    with pytest.raises(SystemExit) as left:
        cli.main(["--quiet", "train", str(runs.written(tmp_path / "run", contents))])
    out, err = capsys.readouterr()
    assert (left.value.code, out, err.count("\n")) == (2, "", 1)
    assert f"{target} shares its weight with {other}" in err and "method.save_modules: [transformer.wte]" in err
    assert not (tmp_path / "run").exists()
