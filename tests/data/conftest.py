"""Small tokenizers made on the spot, and the chat templates beside this file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from peftctl.data.chat import Chat

TEMPLATES = Path(__file__).parent / "templates"
SPECIAL = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|turn|>"]
SPECIAL += ["<|user|>", "<|system|>", "<|assistant|>"]
TEXT = [
    "the cat sat on the mat and the dog sat on the log",
    "\n\n\n\n  user assistant system model",
    "Hello there! ",
] * 9

Maker = Callable[..., Path]


def tokenizer(merges: bool = True, adds_bos: bool = False) -> Tokenizer:
    """Byte-level BPE, with a few merges or with bytes alone."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(alphabet) + len(SPECIAL) + (60 if merges else 0)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    if adds_bos:
        made.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    return made


def write(folder: Path, made: Tokenizer, template: str | None, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text((TEMPLATES / f"{template}.jinja").read_text())
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """A tokenizer's folder: `made(template, merges=True, adds_bos=False, **tokenizer_config)`."""
    root = tmp_path_factory.mktemp("tokenizers")

    def make(template: str | None, merges: bool = True, adds_bos: bool = False, **config: object) -> Path:
        folder = root / str(len(list(root.iterdir())))
        return write(folder, tokenizer(merges, adds_bos), template, **config)

    return make


@pytest.fixture(scope="session")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that marks spaces with an underscore and puts one before the first word."""
    model = Tokenizer(models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("\n"), "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    model.decoder = decoders.Metaspace(prepend_scheme="first")
    model.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    )
    return write(tmp_path_factory.mktemp("metaspace"), model, "plain")


@pytest.fixture(scope="session")
def chat(made: Maker) -> Chat:
    """The usual one; a module that needs another has its own."""
    return Chat(made("chatml"))
