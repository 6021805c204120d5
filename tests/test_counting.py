"""Counting: a base counts the same however it is named, no weight is read, and what cannot be counted is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import LlamaConfig

from peftctl import base as bases
from peftctl import cli, methods
from peftctl.base import Base
from peftctl.counting import count, tree
from tests import runs
from tests.hub import serving
from tests.models import tiny

LORA: dict[str, Any] = {"name": "lora", "rank": 4}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFTCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def counted(base: Base, **method: Any) -> dict[str, Any]:
    found = methods.get((LORA | method)["name"])
    return count(base, found, found.config(**(LORA | method))).document(by_module=True)


def header(path: Path, config: LlamaConfig, output: bool = True) -> Path:
    """A GGUF file of keys, a table of two tensors and a hole in the place of these: there is nothing to load."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    shape = (config.vocab_size, config.hidden_size)
    for name in ["token_embd.weight", *(["output.weight"] if output else [])]:
        writer.add_tensor_info(name, shape, np.dtype("float32"), 4 * shape[0] * shape[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + 2 * 4 * shape[0] * shape[1] + 64)
    return path


def test_a_base_counts_the_same_however_it_is_named(folder: Path, tmp_path: Path) -> None:
    model = tiny("llama")
    expected = counted(bases.resolve(str(folder), need="config"))
    assert expected["base"] == model.num_parameters() and expected["adapter"] == sum(expected["by_module"].values())
    (folder / "model.safetensors").unlink()
    assert counted(bases.resolve(str(folder), need="config")) == expected
    bare = folder.rename(tmp_path / "moved") / "config.json"
    assert counted(bases.resolve(str(bare), need="config")) == expected
    written = header(tmp_path / "tiny.gguf", model.config)
    assert counted(bases.resolve(str(written), need="config")) == expected


def test_a_gguf_header_without_a_head_of_its_own_means_a_tied_one(tmp_path: Path) -> None:
    config = tiny("llama").config
    own, tied = (header(tmp_path / f"{output}.gguf", config, output) for output in (True, False))
    saved = config.vocab_size * config.hidden_size
    bases_ = [counted(bases.resolve(str(path), need="config"))["base"] for path in (own, tied)]
    assert bases_[0] - bases_[1] == saved


def test_a_gguf_header_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = header(tmp_path / "tiny.gguf", tiny("llama").config)
    first = bases.resolve(str(written), need="config")
    monkeypatch.setattr("peftctl.formats.gguf.architecture", lambda path: pytest.fail("read again"))
    assert bases.resolve(str(written), need="config") == first


def test_a_hub_model_is_counted_by_its_config_alone(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    expected = counted(bases.resolve(str(folder), need="config"))
    with serving("org/tiny", folder) as hub:
        environment = {key: value for key, value in os.environ.items() if not key.endswith("OFFLINE")}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        arguments = ["--base", "org/tiny", "--method", "lora", "--set", "method.rank=4", "--by", "module", "--json"]
        command = [sys.executable, "-m", "peftctl.cli", "count-params", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == expected
        assert hub.files == {"config.json"}
        assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_the_tree_nests_paths_and_sums_them() -> None:
    places = {"a.layers.0.q": 1000, "a.layers.0.k": 20, "a.layers.1.q": 3, "h.c": 4, "h.c.v": 5, "prompt": 6}
    assert tree(places) == [
        "  a.layers  1,023",
        "    0       1,020",
        "      q     1,000",
        "      k        20",
        "    1.q         3",
        "  h.c           9",
        "    itself      4",
        "    v           5",
        "  prompt        6",
    ]


@given(
    st.dictionaries(
        st.lists(st.sampled_from("abc01"), min_size=1, max_size=4).map(".".join), st.integers(1, 9999), min_size=1
    )
)
def test_every_node_of_the_tree_is_the_sum_of_what_is_inside(places: dict[str, int]) -> None:
    lines = [(len(line) - len(line.lstrip()), *line.split()) for line in tree(places)]
    nodes = [(depth, name, int(size.replace(",", ""))) for depth, name, size in lines]
    leaves = []
    for index, (depth, _, size) in enumerate(nodes):
        after = list(takewhile(lambda node, depth=depth: node[0] > depth, nodes[index + 1 :]))
        inside = [inner for deeper, _, inner in after if deeper == depth + 2]
        assert sum(inside) == size if inside else leaves.append(size) is None
    assert sorted(leaves) == sorted(places.values())
    assert sum(size for depth, _, size in nodes if depth == 2) == sum(places.values())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rank": 0}, "method.rank is 0; a number at least 1 is meant"),
    ({"rank": 33}, "method.rank: 33 is above 32, the smaller side of model.layers.0.self_attn.q_proj"),
    ({"rank": 2.5}, "method.rank"),
    ({"alpha": 0}, "method.alpha is 0"),
    ({"dropout": 1}, "method.dropout is 1"),
    ({"target_modules": ".*query"}, "the regular expression '.*query' matches no whole module path"),
    ({"target_modules": "q_proj"}, "a single name goes in a list"),
    ({"target_modules": "(q"}, "is not a regular expression"),
    ({"target_modules": []}, "method.target_modules"),
    ({"target_modules": ["self_attn"]}, "'self_attn' is a LlamaAttention, which this method cannot adapt"),
    ({"target_modules": ["layers"]}, "'layers' is a ModuleList, which this method cannot adapt"),
    ({"target_modules": ".*mlp"}, "matches no whole module path"),
    ({"target_modules": ["lm_head"], "layers": [0]}, "['lm_head'] matches no module"),
    ({"target_modules": "lm_head"}, "matches the output head alone; where that is meant, name it in a list"),
    ({"layers": [2]}, "2 is not a layer of LlamaForCausalLM; 0 to 1 are"),
]


@pytest.mark.fault(31)
@pytest.mark.parametrize(("keys", "said"), REFUSED, ids=[json.dumps(keys) for keys, _ in REFUSED])
@pytest.mark.parametrize("command", ["count-params", "train"])
def test_what_cannot_be_attached_is_refused_before_weights_are_read(
    command: str, keys: dict[str, Any], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model.safetensors").write_text("no weights")
    contents = runs.document()
    contents["model"]["name"] = str(folder)
    contents["method"] = LORA | keys
    with pytest.raises(SystemExit) as end:
        cli.main(["--quiet", command, str(runs.written(tmp_path / "run", contents))])
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (2, "", 1) and said in err
    assert not (tmp_path / "run").exists()


def test_a_shrunk_base_is_counted_as_it_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = runs.document()
    contents["model"]["shrink"] = True
    path = str(runs.written(tmp_path / "run", contents))
    found = []
    for command in (["count-params"], ["train", "--dry-run"]):
        with pytest.raises(SystemExit):
            cli.main(["--quiet", *command, path, "--json"])
        found.append(json.loads(capsys.readouterr().out))
    assert found[0].items() <= found[1].items()
    assert found[0]["base"] != counted(bases.resolve(contents["model"]["name"]))["base"]


def test_the_output_head_is_counted_where_it_is_asked_for(folder: Path) -> None:
    base = bases.resolve(str(folder), need="config")
    assert counted(base, target_modules=["lm_head"])["by_module"] == {"lm_head": 4 * (32 + 128)}
    assert "lm_head" not in counted(base)["by_module"]


@pytest.mark.parametrize("name", [name for name in methods.names() if "rank" in methods.get(name).config.model_fields])
def test_no_method_takes_a_rank_below_one(name: str) -> None:
    for rank in (0, -1, 1.0, True):
        with pytest.raises(ValidationError, match=r"(?m)^rank$"):
            methods.get(name).config(name=name, rank=rank)
