"""`peftctl export`: what is written loads again, what another program does not take is refused before any file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from peftctl import cli, methods
from peftctl.base import resolve
from peftctl.errors import InputError
from peftctl.exporting import export
from peftctl.formats import adapterhub, peft
from peftctl.opened import find
from peftctl.surgery import skeleton
from tests.methods import contract
from tests.models import tiny
from tests.runs import CONFIGS


@pytest.fixture
def base(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    tiny(getattr(request, "param", "llama")).save_pretrained(tmp_path / "base")
    shutil.copytree(CONFIGS / "tokenizer", tmp_path / "base", dirs_exist_ok=True)
    return tmp_path / "base"


def adapter(base: Path, name: str, **keys: Any) -> Path:
    """An adapter folder as a run writes it."""
    folder = base.with_name("adapter")
    config = contract.config(name, **keys)
    model, attachment = contract.attached(config, json.loads((base / "config.json").read_text())["model_type"])
    contract.disturb(attachment)
    folder.mkdir()
    peft.write(folder, methods.get(name), config, skeleton(model), attachment.tensors(), resolve(str(base)))
    return folder


def same(one: Path, other: Path) -> None:
    a, b = find(str(one)).adapter, find(str(other)).adapter
    assert a is not None and b is not None
    assert a.method is b.method and set(a.tensors) == set(b.tensors)
    assert all(torch.equal(tensor, b.tensors[key]) for key, tensor in a.tensors.items())


def test_pefts_form_is_the_one_that_runs_write(base: Path, tmp_path: Path) -> None:
    source = adapter(base, "lora", rank=4)
    result = export(str(source), tmp_path / "out", to="peft")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in source.iterdir())
    assert (tmp_path / "out" / peft.WEIGHTS).read_bytes() == (source / peft.WEIGHTS).read_bytes()
    same(source, tmp_path / "out")
    assert result["format"] == "peft" and result["notes"] == []
    assert (
        result["parameters"]
        == methods.get("lora").count(skeleton(tiny("llama")), contract.config("lora", rank=4)).total
    )


@pytest.mark.parametrize("name", ["bottleneck", "compacter"])
def test_adapter_hubs_form_is_read_by_every_command(name: str, base: Path, tmp_path: Path) -> None:
    source = adapter(base, name)
    export(str(source), tmp_path / "out", to="adapterhub", name="mine")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [adapterhub.WEIGHTS, adapterhub.CONFIG]
    same(source, tmp_path / "out")
    # and goes back into ours by way of it
    export(str(tmp_path / "out"), tmp_path / "again", to="adapterhub", base=str(base))
    same(source, tmp_path / "again")


def test_gguf_is_one_file(base: Path, tmp_path: Path) -> None:
    export(str(adapter(base, "lora", rank=4)), tmp_path / "deep" / "a.gguf", to="gguf")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.gguf"]
    assert gguf.GGUFReader(tmp_path / "deep" / "a.gguf").fields["general.type"].contents() == "adapter"


def test_vllm_is_told_the_rank(base: Path, tmp_path: Path) -> None:
    result = export(
        str(adapter(base, "lora", rank=20, target_modules=["q_proj"])), tmp_path / "out", to="peft", server="vllm"
    )
    assert result["notes"] == ["start vLLM with --max-lora-rank 32: the rank is 20"]


@pytest.mark.parametrize(
    ("keys", "asked", "says"),
    [
        ({"name": "bottleneck"}, {"to": "peft"}, "peft package has no bottleneck adapters; export it --to adapterhub"),
        ({"name": "full"}, {"to": "peft"}, "has no full adapters; fold it into its base with peftctl merge"),
        ({"name": "dora"}, {"to": "peft", "server": "vllm"}, "it has no DoRA; fold it into its base"),
        (
            {"name": "prefix", "num_virtual_tokens": 2},
            {"to": "peft", "server": "vllm"},
            "it serves LoRA alone, not PREFIX_TUNING; serve it with peftctl generate",
        ),
        ({"name": "lora"}, {"to": "adapterhub"}, "of bottleneck and compacter adapters; lora is none"),
        ({"name": "bottleneck"}, {"to": "adapterhub", "name": "a.b"}, "--name: 'a.b' becomes a part"),
        ({"name": "bottleneck"}, {"to": "gguf"}, "llama.cpp loads lora adapters alone, not bottleneck"),
        ({"name": "lora"}, {"to": "ggu"}, "--to: 'ggu' is none of peft, adapterhub, gguf; did you mean gguf?"),
        ({"name": "lora"}, {"to": "gguf", "server": "vllm"}, "--for: vllm is known, which reads what --to peft"),
        ({"name": "lora"}, {"to": "peft", "server": "tgi"}, "--for: vllm is known"),
    ],
)
def test_a_refusal_is_one_sentence_and_leaves_nothing(
    keys: dict[str, Any], asked: dict[str, Any], says: str, base: Path, tmp_path: Path
) -> None:
    source = adapter(base, **keys)
    with pytest.raises(InputError) as caught:
        export(str(source), tmp_path / "out", **asked)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize("asked", [{"to": "gguf"}, {"to": "peft", "server": "vllm"}])
@pytest.mark.parametrize("base", ["mixtral", "qwen3_moe"], indirect=True)
def test_experts_that_another_program_does_not_take_may_be_merged(
    asked: dict[str, str], base: Path, tmp_path: Path
) -> None:
    source = adapter(base, "lora", rank=4, target_modules=["experts.gate_up_proj", "experts.down_proj"])
    with pytest.raises(InputError, match=r"; fold it into its base with peftctl merge$") as caught:
        export(str(source), tmp_path / "out", **asked)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    export(str(source), tmp_path / "out", to="peft")
    same(source, tmp_path / "out")


@pytest.mark.parametrize("to", ["peft", "adapterhub", "gguf"])
def test_what_is_there_is_never_replaced(to: str, base: Path, tmp_path: Path) -> None:
    source = adapter(base, "lora")
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    for output in (source, source / peft.WEIGHTS):
        with pytest.raises(InputError, match="exists already"):
            export(str(source), output, to=to)
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before
    with pytest.raises(InputError, match="nothing to export"):
        export(str(base), tmp_path / "out", to=to)


def test_the_command_prints_one_document(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = adapter(base, "bottleneck", width=3)
    words = ["export", str(source), "--to", "adapterhub", "--output", str(tmp_path / "out"), "--json"]
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert not left.value.code
    document = json.loads(capsys.readouterr().out)
    assert document["output"] == str(tmp_path / "out") and document["method"] == "bottleneck"
    assert "use_safetensors=True" in document["notes"][0] and "peftctl" in document["notes"][0]
