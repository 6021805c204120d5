"""What was made to run code, to write elsewhere or to phone home: it does not."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftctl import cli, recipe, run
from peftctl.data import cache
from peftctl.errors import PeftctlError, RecipeError
from peftctl.plan import Options
from tests import runs
from tests.cost import seconds
from tests.faults.conftest import Answer, Seen
from tests.test_located import largest

Call = Callable[..., Answer]
PICKLES = (  # what peers keep as pickles beside a model, an adapter or a checkpoint
    *("rng_state.pth", "training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", ".metadata"),
    *("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin", "pytorch_adapter.bin", "pytorch_model_head.bin"),
    *("value_head.bin", "embeddings.pt", "consolidated.00.pth", "model.ckpt", "tokenizer.pkl", "random_states_0.pkl"),
)
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


# what peers unpickle: data, or what is gone on from, and how its reader is reached
PICKLED: dict[str, tuple[str, dict[str, Any]]] = {
    "data": ("rows.pkl", {"data": {"train": "{}"}}),
    "tensors as data": ("rows.pt", {"data": {"train": "{}"}}),
    "numbers as data": ("rows.npy", {"data": {"train": "{}"}}),
    "data under a plain name": ("rows.jsonl", {"data": {"train": "{}"}}),
    "data in a table's name": ("rows.parquet", {"data": {"train": "{}"}}),
    "a folder of data": ("rows/dataset.pkl", {"data": {"train": "{}"}}),
    "held-out data": ("held.pkl", {"data": {"validation": "{}"}}),
    "a tokenizer": ("tokenizer/tokenizer.json", {"model": {"tokenizer": "{}"}}),
    "a template": ("template.jinja", {"data": {"chat_template": "{}"}}),
    "where to begin": ("begin/adapter_model.bin", {"method": {"init_from": "{}"}}),
    "what to compare with": ("compared/adapter_model.bin", {"objective": {"name": "dpo", "reference": "{}"}}),
    "a base": ("base/pytorch_model.bin", {"model": {"name": "{}"}}),
}


@pytest.mark.fault(27)
@pytest.mark.parametrize("what", PICKLED)
def test_a_recipe_that_names_a_pickle_is_refused(what: str, trained: Path, tmp_path: Path, call: Call) -> None:
    name, blocks = PICKLED[what]
    path, canary = tmp_path / name, tmp_path / "canary"
    if path.parent.name in ("begin", "compared"):
        shutil.copytree(trained / "adapter", path.parent)
        (path.parent / "adapter_model.safetensors").unlink()
    elif path.parent.name == "base":
        shutil.copytree(trained / "base", path.parent)
        (path.parent / "model.safetensors").unlink()
    elif path.parent.name == "tokenizer":
        shutil.copytree(runs.CONFIGS / "tokenizer", path.parent)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(Canary(canary)))
    told = str(path.parent if path.parent != tmp_path else path)
    named = {block: {k: v.replace("{}", told) for k, v in keys.items()} for block, keys in blocks.items()}
    objective = named.get("objective", {}).get("name", "sft")
    recipe = runs.written(tmp_path / "run", runs.document("lora", objective, **named))
    answer = call("--quiet", "train", recipe)
    assert answer.code == 2 and answer.err.startswith("peftctl: error: ") and "Traceback" not in answer.err
    assert not canary.exists()


@pytest.mark.fault(27)
def test_a_peers_checkpoint_is_not_gone_on_from(tmp_path: Path, call: Call) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "theirs" / "checkpoint-10"
    folder.mkdir(parents=True)
    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    recipe = runs.written(tmp_path / "run", EVERY_STEP)
    for words in (["--resume-from", folder], ["--resume", "--output", folder.parent]):
        assert call("--quiet", "train", recipe, *words).code == 2
    assert not canary.exists()


@pytest.mark.fault(27, 39)
def test_what_is_kept_between_runs_is_no_pickle_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: Seen
) -> None:
    """Every file of the caches, replaced by one that would run code, is made anew."""
    folder, canary = tmp_path / "cache", tmp_path / "canary"
    monkeypatch.setenv("PEFTCTL_CACHE", str(folder))
    monkeypatch.setattr(cache, "SMALL", 0)  # tokens are kept of large files alone
    contents = runs.document("lora", "dpo")
    runs.train(tmp_path / "one", contents)
    kinds = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()}
    assert {"tokens", "references", "skeletons"} <= kinds
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        path.write_bytes(pickle.dumps(Canary(canary)).ljust(path.stat().st_size, b"."))
    runs.train(tmp_path / "two", contents)
    assert not canary.exists() and runs.untimed(tmp_path / "one") == runs.untimed(tmp_path / "two")
    seen(f"{len(files)} files of {', '.join(sorted(kinds))} made anew")


CODE = "import os\nos.mkdir({canary!r})\n"
CONFIGS: dict[str, dict[str, Any]] = {
    "auto_map": {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}},
    "type": {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}},
    "nested": {"text_config": {"auto_map": {"AutoConfig": "own.Config"}, "trust_remote_code": True}},
    "told to trust": {"trust_remote_code": True, "auto_map": {"AutoConfig": "own.Config"}},
    "attention": {"_attn_implementation": "someone/kernel", "trust_remote_code": True},
    "attention inside": {"attn_implementation": "someone/kernel", "_attn_implementation_internal": "someone/kernel"},
    "attention paged": {"attn_implementation": "paged|someone/kernel"},
    "attention by parts": {"attn_implementation": {"text_config": "someone/kernel@v1:function"}},
    "attention below": {"text_config": {"_attn_implementation": "someone/kernel"}},
    "experts": {"experts_implementation": "someone/kernel"},
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
    recipe = runs.written(tmp_path / "run", runs.document(model={"name": str(base)}))
    answers = [
        call("generate", base, "--prompt", "x", "--max-new-tokens", 1),
        call("--quiet", "train", recipe, "--no-verify"),
        call("validate", recipe),
        call("count-params", recipe),
        call("merge", trained / "adapter", "--base", base, "--output", tmp_path / "merged"),
    ]
    assert not canary.exists() and not unconnected
    for answer in answers:
        assert answer.code == 2 and "brings its own code: read it, then pass --trust-remote-code" in answer.err
    seen(answers[0].err.strip().removeprefix("peftctl: error: "))


@pytest.mark.fault(28)
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flex_attention", "eager", None])
def test_the_attention_that_a_config_names_is_not_fetched(
    name: str | None, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    """transformers takes a hub's kernel in place of a library that is not installed; ours attends in any case."""
    from transformers import PreTrainedModel, modeling_utils

    def load(implementation: str, **more: Any) -> None:
        raise AssertionError(f"{implementation} was asked for")

    asked: list[Any] = []
    checked = PreTrainedModel._check_and_adjust_attn_implementation
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda: True)
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", load)
    monkeypatch.setattr(
        PreTrainedModel,
        "_check_and_adjust_attn_implementation",
        lambda self, wanted, *rest, **more: asked.append(wanted) or checked(self, wanted, *rest, **more),
    )
    base = Path(shutil.copytree(trained / "base", tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"_attn_implementation": name, "attn_implementation": name}))
    answer = call("generate", base, "--prompt", "x", "--max-new-tokens", 1)
    assert answer.code == 0, answer.err
    assert asked and (name is None or name not in asked)


@pytest.mark.fault(28)
def test_no_recipe_can_trust_code(tmp_path: Path, call: Call) -> None:
    contents = runs.document(model={"trust_remote_code": True})
    answer = call("train", runs.written(tmp_path / "run", contents))
    assert answer.code == 2 and "model.trust_remote_code is not a key" in answer.err


@pytest.mark.fault(28)
@pytest.mark.parametrize("trusted", [False, True])
def test_whether_code_was_trusted_is_written_down(trusted: bool, tmp_path: Path) -> None:
    runs.train(tmp_path / "run", runs.document(train={"max_steps": 1}), trust_remote_code=trusted)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["trust_remote_code"] is trusted


BOMBS = {
    "aliases": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "itself": "a: &a {b: *a}\n",
    "merges": "a: &a {x: 1}\n" + "".join(f"m{n}: &m{n} {{<<: [*a, *a]}}\n" for n in range(2000)),
    "depth": "a: " + "[" * 100_000,
    "mappings": "{a: " * 100_000,
    "indents": "".join(" " * n + "a:\n" for n in range(1000)),
    "100 MB": "# a comment\n" * 9_000_000,
    "one line": "a: " + "x" * 100_000_000,
    "code": "a: !!python/object/apply:os.system [touch /tmp/peftctl-canary]\n",
}


@pytest.mark.fault(29, 30)
@pytest.mark.parametrize("kind", BOMBS)
def test_a_yaml_bomb_is_refused_at_once_and_in_little_memory(kind: str, tmp_path: Path, seen: Seen) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(BOMBS[kind])
    allowed = largest()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def refused() -> str:
        with pytest.raises(RecipeError) as caught:
            recipe.load(path)
        return str(caught.value)

    took = seconds(refused)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert took < 3 * allowed and more < 50 << 20, (took, allowed, more)
    assert len(refused()) < 2000
    seen(f"{refused().splitlines()[0].rpartition('/')[2]}: {1000 * took:.0f} ms")


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
    loaded = runs.loaded(tmp_path / "other", runs.document(train={"max_steps": 1}))
    run.train(loaded.model_copy(update={"output": name}), Options(quiet=True))
    assert {p.name for p in tmp_path.iterdir()} == {name, "other.yaml"}
    assert (tmp_path / name / "adapter" / "adapter_model.safetensors").is_file()
    seen("a folder of that very name")


SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY")


@pytest.mark.fault(35)
def test_a_run_on_local_files_reaches_for_nothing_and_tells_no_token(
    trained: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch, unconnected: list[Any], seen: Seen
) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name in SECRETS:
        monkeypatch.setenv(name, "hf_canary")
    output = tmp_path / "run"
    path = runs.written(output, runs.document(model={"name": str(trained / "base")}))
    answers = [
        call("train", path, "--json"),
        call("generate", output, "--prompt", "x", "--max-new-tokens", 1),
        call("eval", output, "--data", runs.CONFIGS / "data" / "messages.jsonl"),
        call("merge", output, "--output", tmp_path / "merged"),
        call("export", output / "adapter", "--to", "peft", "--output", tmp_path / "exported"),
        call("validate", path, "--json"),
        call("count-params", path),
    ]
    assert [answer.code for answer in answers] == [0] * 7 and not unconnected
    wrong = runs.written(tmp_path / "wrong", runs.document(model={"name": str(tmp_path / "nowhere")}))
    for refused in (wrong, path):
        with pytest.raises(PeftctlError) as caught:
            cli.main(["--debug", "train", str(refused)])
        assert "hf_canary" not in "".join(traceback.format_exception(caught.value))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"hf_canary" in path.read_bytes()]
    assert not [answer for answer in answers if "hf_canary" in answer.out + answer.err]
    seen(f"no connection tried, no token in {len(files)} files")
