"""What was made to run code, to write elsewhere or to phone home: it does not."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftctl import run
from peftctl.plan import Options
from tests import runs
from tests.faults.conftest import Answer, Seen

Call = Callable[..., Answer]
PICKLES = ("rng_state.pth", "training_args.bin", "optimizer.pt", "adapter_model.bin", "pytorch_model.bin", "scaler.pt")
EVERY_STEP = runs.document(train={"save_every": 1, "keep": 9})


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.fault(27)
def test_pickles_are_never_opened(trained: Path, tmp_path: Path, call: Call, seen: Seen) -> None:
    output, canary = Path(shutil.copytree(trained, tmp_path / "run")), tmp_path / "canary"
    places = [output, output / "adapter", output / "base", *(output / "checkpoints").iterdir()]
    for place in places:
        for name in PICKLES:
            (place / name).write_bytes(pickle.dumps(Canary(canary)))
    more = runs.document(train={"save_every": 1, "keep": 9, "max_steps": 5})
    runs.train(output, more, resume=True, verify=True)
    assert call("generate", output, "--prompt", "x", "--max-new-tokens", 1).code == 0
    (output / "adapter" / "adapter_model.safetensors").unlink()
    (output / "base" / "model.safetensors").unlink()
    for word in (output / "adapter", output / "base"):
        refused = call("generate", word, "--prompt", "x", "--base", output / "base")
        assert refused.code == 2 and "pickle" in refused.err
    assert not canary.exists()
    pickle.loads((output / PICKLES[0]).read_bytes())
    assert canary.exists(), "it would have been seen"
    seen(refused.err.strip().removeprefix("peftctl: error: "))


CODE = "import os\nos.mkdir({canary!r})\n"
CONFIGS: dict[str, dict[str, Any]] = {
    "auto_map": {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}},
    "type": {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}},
    "nested": {"text_config": {"auto_map": {"AutoConfig": "own.Config"}, "trust_remote_code": True}},
    "told to trust": {"trust_remote_code": True, "auto_map": {"AutoConfig": "own.Config"}},
    "attention": {"_attn_implementation": "someone/kernel", "trust_remote_code": True},
    "attention inside": {"attn_implementation": "someone/kernel", "_attn_implementation_internal": "someone/kernel"},
}


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses that somebody tried to reach."""
    tried: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        tried.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *names, **more: refuse(socket.socket(), names))
    return tried


@pytest.mark.fault(28)
@pytest.mark.parametrize("kind", CONFIGS)
def test_code_that_comes_with_a_model_is_not_run(
    kind: str, trained: Path, tmp_path: Path, call: Call, unconnected: list[Any], seen: Seen
) -> None:
    base, canary = Path(shutil.copytree(trained / "base", tmp_path / "base")), tmp_path / "canary"
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | CONFIGS[kind]))
    for name in ("own.py", "configuration_own.py", "modeling_own.py", "__init__.py"):
        (base / name).write_text(CODE.format(canary=str(canary)))
    answer = call("generate", base, "--prompt", "x", "--max-new-tokens", 1)
    contents = runs.document(model={"name": str(base)})
    call("--quiet", "train", runs.written(tmp_path / "run", contents), "--no-verify")
    assert not canary.exists() and not unconnected
    if "auto_map" in CONFIGS[kind]:
        assert answer.code == 2 and "brings its own code" in answer.err
        seen(answer.err.strip().removeprefix("peftctl: error: "))


@pytest.mark.fault(28)
def test_no_recipe_can_trust_code(tmp_path: Path, call: Call) -> None:
    contents = runs.document(model={"trust_remote_code": True})
    answer = call("train", runs.written(tmp_path / "run", contents))
    assert answer.code == 2 and "model.trust_remote_code is not a key" in answer.err


@pytest.mark.fault(32)
@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\0b", "..", "model.layers.0/../../x"])
def test_a_tensor_with_the_name_of_a_path_is_a_tensor_too_many(
    name: str, trained: Path, tmp_path: Path, call: Call, seen: Seen
) -> None:
    from safetensors.torch import load_file, save_file

    adapter = Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name: next(iter(tensors.values())).clone()}, path, metadata={"format": "pt"})
    answer = call("merge", adapter, "--output", tmp_path / "merged")
    assert answer.code == 2 and len(answer.err.splitlines()) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"adapter"}
    seen(answer.err.strip().removeprefix("peftctl: error: "))


@pytest.mark.fault(33)
@pytest.mark.parametrize("name", ["a; mkdir canary", "$(mkdir canary)", "`mkdir canary`", "a\nmkdir canary", "| x"])
def test_an_output_is_a_path_and_nothing_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Seen
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = runs.loaded(tmp_path / "other", runs.document(train={"max_steps": 1}))
    run.train(recipe.model_copy(update={"output": name}), Options(quiet=True))
    assert {p.name for p in tmp_path.iterdir()} == {name, "other.yaml"}
    assert (tmp_path / name / "adapter" / "adapter_model.safetensors").is_file()
    seen("a folder of that very name")


@pytest.mark.fault(35)
def test_a_run_on_local_files_reaches_for_nothing_and_tells_no_token(
    trained: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch, unconnected: list[Any], seen: Seen
) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, "hf_canary")
    output = tmp_path / "run"
    recipe = runs.written(output, runs.document(model={"name": str(trained / "base")}))
    answers = [
        call("train", recipe, "--json"),
        call("generate", output, "--prompt", "x", "--max-new-tokens", 1),
        call("eval", output, "--data", runs.CONFIGS / "data" / "messages.jsonl"),
        call("merge", output, "--output", tmp_path / "merged"),
    ]
    assert [answer.code for answer in answers] == [0] * 4 and not unconnected
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"hf_canary" in path.read_bytes()]
    assert not [answer for answer in answers if "hf_canary" in answer.out + answer.err]
    seen(f"no connection tried, no token in {len(files)} files")
