"""Files that a workload needs beyond the demo's, made once: rows of a certain length, models of random weights.

Usage: python -m tests.benchmarks.materials rows-1024.jsonl llama-1b vocabulary-151936.json
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftctl.data.chat import Chat
from peftctl.data.order import order
from peftctl.row import Message
from tests.benchmarks.workloads import HELD_OUT, MATERIALS, ROOT

SMOLLM2 = ROOT / ".cache" / "peftctl" / "smollm2-135m"
DIALOGUES = HELD_OUT.with_name("train.jsonl")
ROWS = 64  # enough for every step to have its own
MISSES = 20  # dialogues that may be too long for what is left of a row before it counts as full
# the shape of TinyLlama-1.1B, with the vocabulary of the tokenizer that is here: 1.07e9 parameters
LLAMA_1B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def make(name: str) -> None:
    """A material by its name, unless it is there."""
    target = MATERIALS / name
    if target.exists():
        return
    MATERIALS.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".unfinished-{name}")
    if name == "llama-1b":
        random_model(unfinished, LLAMA_1B)
    elif found := re.fullmatch(r"rows-(\d+)\.jsonl", name):
        rows(unfinished, int(found[1]))
    elif found := re.fullmatch(r"vocabulary-(\d+)\.json", name):
        shallow(unfinished, int(found[1]))
    else:
        sys.exit(f"materials: {name} is not known")
    unfinished.rename(target)


def rows(path: Path, length: int, tokenizer: Path = SMOLLM2, dialogues: Path = DIALOGUES) -> None:
    """Dialogues put one after another into rows of `length` tokens, or a few less."""
    chat = Chat(tokenizer)
    source, lines = _repeated(dialogues), []
    while len(lines) < ROWS:
        row: list[Message] = []
        misses = 0
        while misses < MISSES:
            longer = row + next(source)
            if len(chat.dialogue(longer, "assistant")[0]) <= length:
                row = longer
            else:
                misses += 1
        if row:
            lines.append(json.dumps({"messages": [{"role": one.role, "content": one.content} for one in row]}))
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _repeated(dialogues: Path) -> Iterator[list[Message]]:
    """The dialogues of a file over and over, each time in another order."""
    text = dialogues.read_text("utf-8")
    found = [[Message(**turn) for turn in json.loads(line)["messages"]] for line in text.splitlines()]
    epoch = 0
    while True:
        yield from (found[index] for index in order(len(found), 0, epoch))
        epoch += 1


def shallow(path: Path, vocabulary: int) -> None:
    """SmolLM2's config with 4 layers and another vocabulary; its weights are drawn when it is used."""
    config = json.loads((SMOLLM2 / "config.json").read_text("utf-8"))
    path.write_text(json.dumps(config | {"num_hidden_layers": 4, "vocab_size": vocabulary}), "utf-8")


def random_model(folder: Path, config: dict[str, Any]) -> None:
    """A folder with random bf16 weights and SmolLM2's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    own = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **own), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(SMOLLM2 / name, folder / name)


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        make(wanted)
