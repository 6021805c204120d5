"""adapter-hub's folders: keys and schema as its package has them, read again bit for bit, and equal logits in it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftctl.adapter import attach
from peftctl.errors import FormatError, InputError
from peftctl.formats import adapterhub
from peftctl.formats.adapterhub import CONFIG, LAYOUTS, WEIGHTS
from peftctl.formats.origin import base_of
from peftctl.formats.peft import read
from peftctl.methods.attachment import Attachment
from peftctl.methods.base import MethodConfig
from peftctl.surgery import skeleton
from tests.methods import contract
from tests.models import inputs, logits, tiny

ORACLE = Path(__file__).parents[2] / ".venv-adapters" / "bin" / "python"
NAMES = tuple(LAYOUTS)
# of ours, and the presets of theirs that compute the same
VARIANTS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "houlsby": ({"name": "bottleneck", "preset": "houlsby"}, "double_seq_bn", {}),
    "pfeiffer": ({"name": "bottleneck", "preset": "pfeiffer", "width": 5}, "seq_bn", {"reduction_factor": 6}),
    "parallel": ({"name": "bottleneck", "preset": "parallel"}, "par_bn", {}),
    "gelu": ({"name": "bottleneck", "activation": "gelu_new"}, "seq_bn", {"non_linearity": "gelu_new"}),
    "compacter": ({"name": "compacter", "preset": "compacter"}, "compacter", {"reduction_factor": 8}),
    "compacter++": (
        {"name": "compacter", "phm_dim": 2, "rank": 2, "width": 6},
        "compacter++",
        {"reduction_factor": 5, "phm_dim": 2, "phm_rank": 2},
    ),
}


def made(variant: str, name: str) -> tuple[MethodConfig, Attachment, Any]:
    config = contract.config(**VARIANTS[variant][0])
    model, attachment = contract.attached(config, name)
    contract.disturb(attachment)
    return config, attachment, model


def written(variant: str, name: str, folder: Path, adapter: str = "N") -> tuple[Attachment, Any]:
    config, attachment, model = made(variant, name)
    folder.mkdir(parents=True)
    adapterhub.write(folder, config, skeleton(tiny(name)), attachment.tensors(), "some/base", adapter)
    return attachment, model


def document(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return found


@pytest.mark.parametrize(
    ("name", "preset", "parts"),
    [
        ("llama", "houlsby", ["model.layers.{}.attention_adapters", "model.layers.{}.output_adapters"]),
        ("llama", "pfeiffer", ["model.layers.{}.output_adapters"]),
        ("gpt2", "houlsby", ["transformer.h.{}.attention_adapters", "transformer.h.{}.output_adapters"]),
        ("gpt2", "parallel", ["transformer.h.{}.output_adapters"]),
        ("bert", "houlsby", ["bert.encoder.layer.{}.attention.output", "bert.encoder.layer.{}.output"]),
        ("bert", "pfeiffer", ["bert.encoder.layer.{}.output"]),
    ],
)
def test_the_keys_are_adapter_hubs(name: str, preset: str, parts: list[str], tmp_path: Path) -> None:
    written(preset, name, tmp_path / "a")
    ends = ["adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias"]
    expected = {f"{part.format(i)}.adapters.N.{end}" for part in parts for i in range(2) for end in ends}
    assert set(load_file(tmp_path / "a" / WEIGHTS)) == expected


def test_the_attentions_network_is_the_attentions(tmp_path: Path) -> None:
    attachment, _ = written("houlsby", "llama", tmp_path / "a")
    stored, own = load_file(tmp_path / "a" / WEIGHTS), attachment.tensors()
    theirs = "model.layers.1.{}.adapters.N.adapter_down.0.weight"
    for ours, part in (("self_attn.o_proj", "attention_adapters"), ("mlp.down_proj", "output_adapters")):
        assert torch.equal(stored[theirs.format(part)], own[f"model.layers.1.{ours}.down.weight"])


def test_the_schema_is_adapter_hubs(tmp_path: Path) -> None:
    written("parallel", "llama", tmp_path / "a")
    found = document(tmp_path / "a")
    assert {k: v for k, v in found.items() if k != "config"} == {
        "hidden_size": 32,
        "model_class": "LlamaForCausalLM",
        "model_name": "some/base",
        "model_type": "llama",
        "name": "N",
        "version": "adapters.1.3.0",
    }
    config = found["config"]
    told = ("mh_adapter", "output_adapter", "is_parallel", "scaling", "reduction_factor", "non_linearity")
    assert [config[key] for key in told] == [False, True, True, 4.0, 2, "relu"]
    assert base_of(tmp_path / "a") == ("some/base", None)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_again_bit_for_bit(name: str, variant: str, tmp_path: Path) -> None:
    attachment, model = written(variant, name, tmp_path / "a")
    adapter = read(tmp_path / "a", skeleton(tiny(name)))
    own = attachment.tensors()
    assert set(adapter.tensors) == set(own)
    assert all(torch.equal(tensor, own[key]) for key, tensor in adapter.tensors.items())
    assert torch.equal(served(tmp_path / "a", name), contract.answer(model, attachment))


def served(folder: Path, name: str) -> Tensor:
    """The logits of a tiny model with the adapter of a folder on it."""
    clean = tiny(name)
    adapter = read(folder, skeleton(clean))
    attach(clean, adapter.method, adapter.config, 0).load(adapter.tensors)
    return logits(clean)


@pytest.mark.parametrize("hidden", [32, 48, 100, 576, 768, 1000])
def test_any_width_is_made_of_the_factor(hidden: int) -> None:
    for width in range(1, hidden + 20):
        factor = adapterhub._reduction(hidden, width, 16)
        assert max(1, int(hidden // factor)) == width
    assert adapterhub._reduction(768, 48, 16.0) == 16


def test_a_bare_models_folder_is_read(tmp_path: Path) -> None:
    """BertModel has no `bert.` before its names."""
    attachment, _ = written("pfeiffer", "bert", tmp_path / "a")
    stored = load_file(tmp_path / "a" / WEIGHTS)
    save_file({key.removeprefix("bert."): tensor for key, tensor in stored.items()}, tmp_path / "a" / WEIGHTS)
    tensors = read(tmp_path / "a", skeleton(tiny("bert"))).tensors
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in attachment.tensors().items())


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"architecture": "prefix_tuning"}, "adapter-hub's prefix_tuning is not read; its bottlenecks are"),
        ({"ln_before": True}, "ln_before is True"),
        ({"use_gating": True}, "use_gating is True"),
        ({"leave_out": [0]}, r"leave_out is \[0\]"),
        ({"residual_before_ln": "post_add"}, "residual_before_ln is 'post_add'"),
        ({"inv_adapter": "nice"}, "inv_adapter is 'nice'"),
        ({"scaling": "learned"}, "no preset here has .*scaling 'learned'"),
        ({"original_ln_before": False}, "no preset here has"),
        ({"is_parallel": True}, "no preset here has"),
        ({"non_linearity": "elu"}, "activation"),
        ({"phm_layer": True}, "does not fit LlamaForCausalLM: (.* has no place; )"),
    ],
)
def test_what_no_method_computes_is_refused(keys: dict[str, Any], says: str, tmp_path: Path) -> None:
    written("pfeiffer", "llama", tmp_path / "a")
    found = document(tmp_path / "a")
    (tmp_path / "a" / CONFIG).write_text(json.dumps(found | {"config": found["config"] | keys}))
    with pytest.raises(FormatError, match=says) as caught:
        read(tmp_path / "a", skeleton(tiny("llama")))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_training_alone_needs_changes_nothing(tmp_path: Path) -> None:
    written("pfeiffer", "llama", tmp_path / "a")
    before, found = served(tmp_path / "a", "llama"), document(tmp_path / "a")
    found["config"] |= {"dropout": 0.1, "init_weights": "houlsby", "ln_after": None}
    (tmp_path / "a" / CONFIG).write_text(json.dumps(found))
    assert torch.equal(served(tmp_path / "a", "llama"), before)


def test_files_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    written("pfeiffer", "llama", tmp_path / "a")
    weights = tmp_path / "a" / WEIGHTS
    stored = load_file(weights)
    gone = "model.layers.1.output_adapters.adapters.N.adapter_up.bias"
    save_file({key: tensor for key, tensor in stored.items() if key != gone}, weights)
    with pytest.raises(FormatError, match=f"{gone} is missing"):
        read(tmp_path / "a", skeleton(tiny("llama")))
    weights.write_bytes(b"no safetensors")
    with pytest.raises(FormatError, match=WEIGHTS):
        read(tmp_path / "a", skeleton(tiny("llama")))
    weights.rename(tmp_path / "a" / "pytorch_adapter.bin")
    with pytest.raises(FormatError, match="a pickle, which is never read: save it again with use_safetensors=True"):
        read(tmp_path / "a", skeleton(tiny("llama")))


@pytest.mark.parametrize(
    ("name", "keys", "says"),
    [
        ("opt", {"name": "bottleneck"}, "adapter-hub's form of OPTForCausalLM is not known here; those of llama"),
        ("llama", {"name": "lora"}, "of bottleneck and compacter adapters; lora is none of these"),
        ("llama", {"name": "bottleneck", "save_modules": ["lm_head"]}, r"no place for saved modules \(lm_head\)"),
    ],
)
def test_what_cannot_be_written_is_refused(name: str, keys: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        adapterhub.write(tmp_path, contract.config(**keys), skeleton(tiny(name)), {}, "some/base", "N")
    assert not list(tmp_path.iterdir())


class Told(NamedTuple):
    """Logits of adapter-hub's package, by variant: of what we wrote, and of what it wrote."""

    ours: dict[str, Tensor]
    theirs: dict[str, Tensor]
    folder: Path


@pytest.fixture(scope="module", params=NAMES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Told]:
    """One process for each base: importing the package takes most of the time."""
    if not ORACLE.exists():
        pytest.skip("adapter-hub's package is not there: `make adapterhub-venv` builds its .venv-adapters")
    name: str = request.param
    folder = tmp_path_factory.mktemp(name)
    tiny(name).save_pretrained(folder / "base")
    jobs: list[dict[str, Any]] = []
    for variant, (_, config, keys) in VARIANTS.items():
        written(variant, name, folder / f"ours-{variant}", "ours")
        jobs.append({"name": "ours", "load": str(folder / f"ours-{variant}"), "out": f"{folder}/ours-{variant}.out"})
        made = {"name": "theirs", "config": config, "keys": keys, "save": str(folder / f"theirs-{variant}")}
        jobs.append(made | {"out": f"{folder}/theirs-{variant}.out"})
    asked = {"base": str(folder / "base"), "ids": inputs(tiny(name))["input_ids"].tolist(), "jobs": jobs}
    (folder / "asked.json").write_text(json.dumps(asked))
    script = Path(__file__).with_name("adapterhub_oracle.py")
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([ORACLE, script, folder / "asked.json"], env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = {
        side: {variant: load_file(folder / f"{side}-{variant}.out")["logits"] for variant in VARIANTS}
        for side in ("ours", "theirs")
    }
    return name, Told(answers["ours"], answers["theirs"], folder)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_adapter_hub_computes_the_same_of_our_folder(oracle: tuple[str, Told], variant: str) -> None:
    name, told = oracle
    _, attachment, model = made(variant, name)
    assert not torch.allclose(told.ours[variant], logits(tiny(name)), atol=1e-2)
    torch.testing.assert_close(told.ours[variant], contract.answer(model, attachment), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_adapter_hubs_own_folder_computes_the_same_here(oracle: tuple[str, Told], variant: str) -> None:
    name, told = oracle
    assert not torch.allclose(told.theirs[variant], logits(tiny(name)), atol=1e-2)
    torch.testing.assert_close(
        served(told.folder / f"theirs-{variant}", name), told.theirs[variant], rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_our_config_is_the_one_adapter_hub_writes(oracle: tuple[str, Told], variant: str) -> None:
    _, told = oracle
    ours, theirs = (document(told.folder / f"{side}-{variant}") for side in ("ours", "theirs"))
    widths = ("reduction_factor",)  # of a width there may be several
    assert {k: v for k, v in ours["config"].items() if k not in widths} == {
        k: v for k, v in theirs["config"].items() if k not in widths
    }
    varying = {"config", "name", "model_name"}
    assert {k: v for k, v in ours.items() if k not in varying} == {k: v for k, v in theirs.items() if k not in varying}
