"""Merging at a real size: seconds and memory of `peftctl merge`, of peft, and of a plain copy, each a whole process.

`make bench-merge` runs it; ARGS="--shape 7b --only proof,plain" and others, see --help. The base is made up: the
shape of a known model, random weights in bfloat16 (or a sparse file of zeros), five files; the adapter is a LoRA of
rank 16 on every linear, in peft's format.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from peftctl.formats.shards import INDEX, Entry, header
from tests.benchmarks.workloads import ROOT

FOLDER = ROOT / ".cache" / "peftctl" / "bench-merge"
FILES, RANK = 5, 16
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
"""


class Shape(NamedTuple):
    """A Llama's. `sparse`: its files are holes, but for the norms."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    sparse: bool = False


SHAPES = {
    "tiny": Shape(2, 256, 512, 8, 4, 512, True),
    "1b": Shape(16, 2048, 8192, 32, 8, 128256, True),
    "3b": Shape(28, 3072, 8192, 24, 8, 128256, True, sparse=True),
    "7b": Shape(32, 4096, 11008, 32, 32, 32000, False, sparse=True),
}


class Measured(NamedTuple):
    seconds: float
    peak: int  # bytes of the largest process


def linears(shape: Shape) -> dict[str, tuple[int, int]]:
    """(out, in) of a layer's linears."""
    width = shape.kv_heads * (shape.hidden // shape.heads)
    square, up = (shape.hidden, shape.hidden), (shape.inner, shape.hidden)
    attention = {"q_proj": square, "k_proj": (width, shape.hidden), "v_proj": (width, shape.hidden), "o_proj": square}
    mlp = {"gate_proj": up, "up_proj": up, "down_proj": (shape.hidden, shape.inner)}
    inside = {f"self_attn.{name}": size for name, size in attention.items()}
    return inside | {f"mlp.{name}": size for name, size in mlp.items()}


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        for name, size in linears(shape).items():
            yield f"model.layers.{layer}.{name}.weight", size
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", (shape.hidden,)
    yield "model.norm.weight", (shape.hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocabulary, shape.hidden)


def config(shape: Shape) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def write(name: str) -> None:
    """The folders of the base and of the adapter, once."""
    shape, base, adapter = SHAPES[name], FOLDER / name / "base", FOLDER / name / "adapter"
    if not (base / INDEX).is_file():
        base.mkdir(parents=True, exist_ok=True)
        (base / "config.json").write_text(json.dumps(config(shape), indent=1))
        for file in (ROOT / "configs" / "tokenizer").iterdir():
            shutil.copyfile(file, base / file.name)
        _base(shape, base)
    if not (adapter / "adapter_config.json").is_file():
        adapter.mkdir(parents=True, exist_ok=True)
        _adapter(shape, base, adapter)


def _base(shape: Shape, folder: Path) -> None:
    import torch

    torch.manual_seed(0)
    whole = list(tensors(shape))
    part, places, written = sum(2 * prod(size) for _, size in whole) / FILES, dict[str, str](), 0
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(FILES)]
    for name, size in whole:
        groups[min(int(written / part), FILES - 1)].append((name, size))
        written += 2 * prod(size)
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{FILES:05d}.safetensors"
        _file(folder / file, group, shape.sparse)
        places |= {name: file for name, _ in group}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": written}, "weight_map": places}))


def _file(path: Path, group: list[tuple[str, tuple[int, ...]]], sparse: bool) -> None:
    import torch

    entries, at = [], 0
    for name, size in group:
        entries.append(Entry(name, "BF16", size, at, at + 2 * prod(size)))
        at = entries[-1].end
    with path.open("wb") as file:
        file.write(header(entries, {"format": "pt"}))
        for entry in entries:
            if sparse and len(entry.shape) > 1 and "q_proj" not in entry.name and "embed" not in entry.name:
                file.seek(entry.end - entry.start, os.SEEK_CUR)
                continue
            value = torch.randn(entry.shape) * 0.02 if len(entry.shape) > 1 else torch.ones(entry.shape)
            file.write(value.bfloat16().view(torch.uint8).numpy().data)
        file.truncate()


def _adapter(shape: Shape, base: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(1)
    values = {}
    for layer in range(shape.layers):
        for name, (out, into) in linears(shape).items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            values[f"{stem}.lora_A.weight"] = torch.randn(RANK, into) * into**-0.5
            values[f"{stem}.lora_B.weight"] = torch.randn(out, RANK) * 0.01
    save_file(values, folder / "adapter_model.safetensors", {"format": "pt"})
    names = sorted(name.rpartition(".")[2] for name in linears(shape))
    keys = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "bias": "none"}
    keys |= {"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(keys, indent=1))


def commands(base: Path, adapter: Path, output: Path) -> dict[str, list[str]]:
    ours = [sys.executable, "-m", "peftctl.cli", "--quiet", "merge", str(adapter), "--output", str(output)]
    return {
        "proof": ours,
        "plain": [*ours, "--no-verify"],
        "peft": [sys.executable, "-c", PEFT, str(base), str(adapter), str(output)],
        "copy": ["cp", "-r", str(base), str(output)],
        "imports": [sys.executable, "-c", "import peftctl.merging"],
    }


def measured(command: list[str], output: Path) -> Measured:
    """A command in a process of its own, its output removed before, and what others wrote on the disk."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT)})
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:6])} ended with {process.returncode}")
    return Measured(seconds, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--rounds", type=int, default=3, help="each in turn, so many times")
    parser.add_argument("--only", default="proof,plain,peft,copy,imports", help="which of them, by commas")
    parser.add_argument("--make", action="store_true", help="only write base and adapter")
    asked = parser.parse_args()
    if asked.make:
        write(asked.shape)
        return
    # in a process of its own: a child's largest size begins at its parent's
    subprocess.run([sys.executable, "-m", "tests.benchmarks.merge", "--shape", asked.shape, "--make"], check=True)
    base, adapter = (FOLDER / asked.shape / part for part in ("base", "adapter"))
    output = FOLDER / asked.shape / "merged"
    todo = {name: command for name, command in commands(base, adapter, output).items() if name in asked.only.split(",")}
    found: dict[str, list[Measured]] = {name: [] for name in todo}
    for number in range(1, asked.rounds + 1):
        for name, command in todo.items():
            one = measured(command, output)
            found[name].append(one)
            print(f"round {number}  {name:<8} {one.seconds:6.1f} s  {one.peak / 1e9:5.2f} GB", flush=True)
    shutil.rmtree(output, ignore_errors=True)
    for name, several in found.items():
        print(f"median   {name:<8} {median(s for s, _ in several):6.1f} s  {max(p for _, p in several) / 1e9:5.2f} GB")


if __name__ == "__main__":
    main()
