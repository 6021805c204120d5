"""A tokenizer with tokens that its own lacks: a folder of its files with them in, kept."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from peftctl.base import cache_folder
from peftctl.errors import InputError
from peftctl.storage import publish


def extended(folder: Path, tokens: Sequence[str]) -> Path:
    """The folder of a tokenizer that has these tokens as well, numbered in their order after all others.

    Raises InputError for a token that is there already.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    known = [token for token in tokens if token in vocabulary]
    if known:
        raise InputError(f"model.add_tokens: {known[0]!r} is a token of {folder} already; leave it out")
    first = max(vocabulary.values()) + 1
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    if [tokenizer.token_to_id(token) for token in tokens] != list(range(first, first + len(tokens))):
        raise InputError(f"model.add_tokens: the numbers of {folder}'s tokens have gaps, so none can be added")
    target = cache_folder() / "tokenizers" / _key(folder, tokens)
    if not (target / "tokenizer.json").is_file():
        _write(folder, tokenizer, target)
    return target


def _key(folder: Path, tokens: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps([str(folder.resolve()), *tokens]).encode())
    for path in sorted(folder.glob("*.json")):
        if path.stat().st_size < 64 << 20 and "index" not in path.name:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _write(folder: Path, tokenizer: Tokenizer, target: Path) -> None:
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for pattern in ("*.json", "*.jinja", "*.txt", "*.model"):
            for path in folder.glob(pattern):
                if path.is_file() and "index" not in path.name:
                    shutil.copyfile(path, temporary / path.name)
        tokenizer.save(str(temporary / "tokenizer.json"))
        publish(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
