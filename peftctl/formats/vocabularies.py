"""The files of a tokenizer, whatever kind it is: which of a folder's files they are, and copying them as they are.

Torch-free, and without reading one: a merge needs no tokenizer, it only passes one on.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
# any of them is a tokenizer by itself, or the half of one
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.spm", "*.tiktoken", "*.vocab", "*.bpe")
BESIDE = ("tokenizer*", "*.jinja", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.codes")
TEMPLATES = "additional_chat_templates"  # a folder of more


def holds(folder: Path | None) -> bool:
    """Whether there is a vocabulary of any kind in a folder."""
    return folder is not None and any(file.is_file() for name in VOCABULARIES for file in folder.glob(name))


def copy(folder: Path, target: Path) -> None:
    """A folder's tokenizer over the one that a model's folder has; its files keep their bytes. Raises OSError."""
    own = {file.name: file for name in (*VOCABULARIES, *BESIDE) for file in folder.glob(name) if file.is_file()}
    if TEMPLATE not in own and _has_template(folder / CONFIG):
        (target / TEMPLATE).unlink(missing_ok=True)  # the file would be read in the place of the tokenizer's own
    for name, file in own.items():
        shutil.copyfile(file, target / name)
    if (folder / TEMPLATES).is_dir():
        shutil.copytree(folder / TEMPLATES, target / TEMPLATES, dirs_exist_ok=True)


def _has_template(config: Path) -> bool:
    """Whether a tokenizer's config holds a chat template itself, as older files do."""
    try:
        found = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and bool(found.get("chat_template"))
