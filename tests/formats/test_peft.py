"""Adapter folders: what is written is read again bit for bit, by us and by peft; what cannot be read says why."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft as oracle
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peftctl import methods
from peftctl.adapter import attach, fit
from peftctl.base import Base, resolve
from peftctl.errors import FormatError, InputError
from peftctl.formats.origin import CONFIG, OURS, WEIGHTS, base_of
from peftctl.formats.origin import other_base as unlike
from peftctl.formats.peft import OWN_TYPE, Adapter, read, write
from peftctl.formats.shards import fingerprint
from peftctl.methods.attachment import Attachment
from peftctl.methods.base import MethodConfig
from peftctl.storage import MANIFEST
from peftctl.surgery import skeleton
from tests.models import logits, tiny

BLOCKS: dict[str, dict[str, Any]] = {
    "compacter": {},
    "ia3": {},
    "ln-tuning": {},
    "full": {"last_layers": 1},
    "lora": {"rank": 2, "target_modules": ["q_proj", "v_proj"]},
    "prefix": {"num_virtual_tokens": 3},
    "prompt": {"num_virtual_tokens": 3},
    "p-tuning": {"num_virtual_tokens": 3, "encoder": "none"},
    "bottleneck": {},
    "bitfit": {"add_missing": True},
    "dora": {"rank": 2},
    "vera": {"rank": 24},
}


@pytest.fixture
def base(tmp_path: Path) -> Base:
    tiny("llama").save_pretrained(tmp_path / "base")
    return resolve(str(tmp_path / "base"))


def other_base(adapter: Adapter, base: Base) -> str | None:
    return unlike(adapter.folder, adapter.trained_on, adapter.fingerprint, base)


def disturbed(name: str) -> tuple[MethodConfig, Attachment]:
    method = methods.get(name)
    config = method.config(name=name, **BLOCKS[name])
    attachment = method.attach(tiny("llama"), config)
    with torch.no_grad():
        for number, tensor in enumerate(attachment.tensors().values()):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)))
    return config, attachment


def written(name: str, base: Base, folder: Path) -> tuple[MethodConfig, Attachment]:
    config, attachment = disturbed(name)
    folder.mkdir()
    write(folder, methods.get(name), config, skeleton(tiny("llama")), attachment.tensors(), base)
    return config, attachment


@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_written_is_read_again_bit_for_bit(name: str, base: Base, tmp_path: Path) -> None:
    _, attachment = written(name, base, tmp_path / "adapter")
    adapter = read(tmp_path / "adapter", skeleton(tiny("llama")))
    assert adapter.method.name == name
    own = attachment.tensors()
    assert set(adapter.tensors) == set(own)
    assert all(torch.equal(tensor, own[key]) for key, tensor in adapter.tensors.items())
    fresh = attach(tiny("llama"), adapter.method, adapter.config, 0)
    fresh.load(adapter.tensors)
    assert base_of(tmp_path / "adapter") == (str((tmp_path / "base").resolve()), None)
    assert adapter.fingerprint == fingerprint(tmp_path / "base")


@pytest.mark.parametrize("name", BLOCKS)
def test_the_files_are_plain_sorted_and_say_pt(name: str, base: Base, tmp_path: Path) -> None:
    written(name, base, tmp_path / "adapter")
    text = (tmp_path / "adapter" / CONFIG).read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    with safe_open(tmp_path / "adapter" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [CONFIG, WEIGHTS, MANIFEST, OURS]


def test_views_and_shared_memory_are_written_as_what_they_hold(base: Base, tmp_path: Path) -> None:
    whole = torch.arange(64.0 * 32).reshape(32, 64)
    config = methods.get("bitfit").config(name="bitfit", add_missing=True)
    tensors = {"transposed": whole.T, "part": whole[3:5], "same": whole[3:5]}
    write(tmp_path, methods.get("bitfit"), config, skeleton(tiny("llama")), tensors, base)
    read_again = read(tmp_path, skeleton(tiny("llama"))).tensors
    assert all(torch.equal(read_again[key], tensor) for key, tensor in tensors.items())


@pytest.mark.filterwarnings("ignore")  # peft's own remarks
def test_peft_loads_the_folder_and_finds_the_base_by_itself(base: Base, tmp_path: Path) -> None:
    _, attachment = written("lora", base, tmp_path / "adapter")
    theirs = oracle.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    model = tiny("llama")
    attachment.install(model)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_pefts_own_is_read(tmp_path: Path) -> None:
    model = oracle.get_peft_model(
        tiny("llama"),
        oracle.LoraConfig(r=4, lora_alpha=6, target_modules=["o_proj"], init_lora_weights=False),
    ).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    adapter = read(tmp_path, skeleton(tiny("llama")))
    assert adapter.fingerprint is None
    clean = tiny("llama")
    attach(clean, adapter.method, adapter.config, 0).load(adapter.tensors)
    torch.testing.assert_close(logits(clean), expected, rtol=1e-5, atol=1e-5)


def test_a_base_named_by_a_relative_path_is_found_from_anywhere(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written("lora", resolve("./base"), tmp_path / "adapter")
    assert base_of(tmp_path / "adapter") == (str((tmp_path / "base").resolve()), None)
    written("lora", base._replace(name="owner/model", revision="c0ffee"), tmp_path / "hub")
    assert base_of(tmp_path / "hub") == ("owner/model", "c0ffee")


def folder_with(folder: Path, config: Any, weights: str | None = WEIGHTS) -> Path:
    (folder / CONFIG).write_text(config if isinstance(config, str) else json.dumps(config))
    if weights is not None and weights.endswith(".bin"):
        (folder / weights).write_bytes(b"\x80\x04")
    elif weights is not None:
        save_file({"prompt_embeddings": torch.zeros(2, 48)}, folder / weights)
    return folder


@pytest.mark.parametrize(
    ("config", "weights", "reason"),
    [
        ({"peft_type": "LORA", "r": 4}, "adapter_model.bin", "a pickle, which is never read"),
        ({"peft_type": "LORA", "r": 4}, None, "no adapter_model.safetensors"),
        ({"config": {"architecture": None}, "version": "adapters.1.0"}, None, "adapter-hub's"),
        ({"r": 4}, WEIGHTS, "no peft_type"),
        ({"peft_type": "BOFT"}, WEIGHTS, "peft_type BOFT is not read; .*LORA.* are"),
        ({"peft_type": "PREFIX_TUNING"}, WEIGHTS, "wide"),
        ({"peft_type": "LORA", "r": "many"}, WEIGHTS, "adapter"),
        ({"peft_type": OWN_TYPE}, WEIGHTS, "peftctl.json"),
        ("[1]", WEIGHTS, "holds no keys"),
        ("{", WEIGHTS, "is not JSON"),
        ("[" * 100_000, WEIGHTS, "is not JSON"),
    ],
)
def test_what_cannot_be_read_says_why(config: Any, weights: str | None, reason: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=reason) as caught:
        read(folder_with(tmp_path, config, weights), skeleton(tiny("llama")))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "document",
    [
        {"format": 2, "method": {"name": "bitfit"}, "base": {}},
        {"format": 1, "method": "bitfit", "base": {}},
        {"format": 1, "method": {"name": "bitfit"}},
        {"format": 1, "method": {"name": "bitfit", "unknown": 1}, "base": {}},
        {"format": 1, "method": {"name": "no-such-method"}, "base": {}},
    ],
)
def test_a_record_of_ours_that_is_not_as_we_write_it_is_refused(document: Any, tmp_path: Path) -> None:
    folder_with(tmp_path, {"peft_type": OWN_TYPE})
    (tmp_path / OURS).write_text(json.dumps(document))
    with pytest.raises(InputError):
        read(tmp_path, skeleton(tiny("llama")))


def test_where_it_was_continued_from_is_not_needed_to_read_it(base: Base, tmp_path: Path) -> None:
    method = methods.get("bitfit")
    config = method.config(name="bitfit", add_missing=True, init_from="gone")
    write(tmp_path, method, config, skeleton(tiny("llama")), {}, base)
    assert read(tmp_path, skeleton(tiny("llama"))).config.init_from is None


@pytest.mark.fault(25)
def test_another_base_is_told_by_the_first_five_tensors(base: Base, tmp_path: Path) -> None:
    written("bottleneck", base, tmp_path / "adapter")
    adapter = read(tmp_path / "adapter", skeleton(tiny("llama")))
    other = adapter.method.config(name="bottleneck", width=7)
    with pytest.raises(FormatError, match=r"does not fit this base: (model\.\S+: [^;]+; ){4}.* and \d+ more"):
        attach(tiny("llama"), adapter.method, other, 0).load(adapter.tensors, "adapter")


@pytest.mark.fault(25)
def test_a_base_of_equal_shapes_and_other_weights_is_told_by_both_names(base: Base, tmp_path: Path) -> None:
    written("lora", base, tmp_path / "adapter")
    adapter = read(tmp_path / "adapter", skeleton(tiny("llama")))
    assert other_base(adapter, base) is None
    tiny("llama").save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert other_base(adapter, resolve(str(tmp_path / "again"))) is None
    other = tiny("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[-1, -1] += 0.1
    other.save_pretrained(tmp_path / "other")
    told = other_base(adapter, resolve(str(tmp_path / "other")))
    assert told is not None and f"trained on {tmp_path / 'base'}, and {tmp_path / 'other'} holds other" in told
    other.save_pretrained(tmp_path / "base")
    told = other_base(adapter, base)
    assert told is not None and told.endswith("base, whose weights have changed since")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, OURS])
def test_a_flipped_bit_is_told(name: str, base: Base, tmp_path: Path) -> None:
    written("lora", base, tmp_path / "adapter")
    path = tmp_path / "adapter" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        FormatError, match=rf"{name}: damaged: sha256 .*; if it was changed on purpose, remove {MANIFEST}"
    ):
        read(tmp_path / "adapter", skeleton(tiny("llama")))


def test_all_tensors_without_a_place_are_told_with_their_shapes(base: Base, tmp_path: Path) -> None:
    written("lora", base, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / WEIGHTS)
    strange = {name.replace("layers.1", "layers.7").replace("layers.0", "layers.6"): t for name, t in stored.items()}
    save_file(strange, tmp_path / "adapter" / WEIGHTS)
    (tmp_path / "adapter" / MANIFEST).unlink()
    said = r"(base_model\S+ \(\d+, \d+\) belongs to model\S+, which LlamaForCausalLM lacks(; | and )){5}3 more"
    with pytest.raises(FormatError, match=said):
        read(tmp_path / "adapter", skeleton(tiny("llama")))


@pytest.mark.parametrize("change", ["missing", "strange", "wider"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_file_that_does_not_fit_is_refused_before_any_weight_is_read(
    name: str, change: str, base: Base, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    written(name, base, folder)
    stored = load_file(folder / WEIGHTS)
    last = sorted(stored)[-1]
    if change == "missing":
        del stored[last]
    elif change == "strange":
        stored["base_model.model.strange"] = torch.zeros(7, 3)
    else:
        stored[last] = torch.cat([stored[last], stored[last]], dim=-1)
    save_file(stored, folder / WEIGHTS)
    (folder / MANIFEST).unlink()
    # what is missing of a whole module leaves an adapter of fewer modules, which the config does not contradict
    fewer = change == "missing" and name in ("ia3", "ln-tuning")
    with nullcontext() if fewer else pytest.raises(FormatError) as caught:
        adapter = read(folder, skeleton(tiny("llama")))
        fit(base, adapter.method, adapter.config, adapter.tensors, "it")
    if not fewer:
        said = str(caught.value)
        told = {
            "missing": "missing|lacks|expected",
            "strange": r"strange",
            "wider": r"\(.*\), \(.*\) expected|wide|neither",
        }
        assert "\n" not in said and re.search(told[change], said)
