"""How long `peftctl validate` takes for many rows, and how much memory: of rows like those of GSM8K, made up here.

`make bench-rows` runs it; ARGS="--rows 1000000 --streaming" and others, see --help.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
NAMES = ("Amara", "Boris", "Chen", "Dalia", "Emeka", "Freya", "Goran", "Hana", "Ivo", "Jamila", "Kofi", "Lena")
THINGS = ("apples", "marbles", "stickers", "pencils", "muffins", "postcards", "seashells", "buttons", "tulips", "coins")
PLACES = ("market", "school fair", "bakery", "harbour", "village library", "train station")


class Measured(NamedTuple):
    """What a call of the command answered, the seconds it took, and the bytes of the largest of its processes."""

    told: dict[str, Any]
    seconds: float
    peak: int


def row(random: Random) -> dict[str, str]:
    """A question in some sentences, and an answer that works it out step by step, as GSM8K writes both."""
    name, friend = random.sample(NAMES, 2)
    thing, place = random.choice(THINGS), random.choice(PLACES)
    bags, each, given, price = (random.randint(low, high) for low, high in ((3, 40), (4, 60), (1, 11), (2, 9)))
    total, left = bags * each, bags * each - given
    question = (
        f"{name} takes {bags} bags of {thing} to the {place}. There are {each} {thing} in every bag. On the way "
        f"{friend} is given {given} of them as a present, and all the others are sold for ${price} each. How many "
        f"dollars does {name} bring home from the {place}?"
    )
    answer = (
        f"At first there are {bags} x {each} = <<{bags}*{each}={total}>>{total} {thing}.\n"
        f"After the present for {friend}, {total} - {given} = <<{total}-{given}={left}>>{left} {thing} are left.\n"
        f"They bring in {left} x ${price} = $<<{left}*{price}={left * price}>>{left * price}.\n#### {left * price}"
    )
    return {"question": question, "answer": answer}


def lines(count: int, seed: int = 0) -> Iterator[str]:
    random = Random(seed)
    return (json.dumps(row(random)) + "\n" for _ in range(count))


def recipe(folder: Path, model: str, tokenizer: str, streaming: bool) -> Path:
    columns = {"instruction": "question", "output": "answer"}
    contents = {
        "model": {"name": model, "tokenizer": tokenizer},
        "method": {"name": "lora"},
        "objective": {"name": "sft"},
        "data": {"train": "rows.jsonl", "validation": 0.01, "columns": columns, "streaming": streaming},
        "train": {"max_steps": 1000},
        "output": "run",
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(contents))
    return path


def measured(path: Path) -> Measured:
    """`peftctl validate` of a recipe in a process of its own, without anything that an earlier call has kept."""
    command = [sys.executable, "-m", "peftctl.cli", "validate", str(path), "--json"]
    own = os.environ | {"PEFTCTL_CACHE": str(path.parent / "cache"), "PYTHONPATH": str(ROOT)}
    begun = time.perf_counter()
    with (path.parent / "told.json").open("w+b") as told:
        process = subprocess.Popen(command, stdout=told, cwd=path.parent, env=own)
        _, status, used = os.wait4(process.pid, 0)  # the largest of it and of all that it has waited for
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begun
        if process.returncode:
            raise SystemExit(f"peftctl validate ended with {process.returncode}")
        told.seek(0)
        return Measured(json.load(told), seconds, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--model", default=str(CONFIGS / "models" / "tiny-llama.json"))
    parser.add_argument("--tokenizer", default=str(CONFIGS / "tokenizer"), help="of one token a byte, if not given")
    parser.add_argument("--streaming", action="store_true", help="keep nothing of the rows")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "rows.jsonl").open("w") as file:
            file.writelines(lines(asked.rows))
        found = measured(recipe(folder, asked.model, asked.tokenizer, asked.streaming))
        size = (folder / "rows.jsonl").stat().st_size
    keys = ("rows", "kept", "refused", "tokens", "labelled_tokens", "p50", "longest", "repeated", "leaked")
    for key in keys:
        print(f"{key:<17} {found.told[key]:,}")
    print(f"bytes             {size:,}")
    print(f"seconds           {found.seconds:.1f} on {os.cpu_count()} processors")
    print(f"largest process   {found.peak / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
