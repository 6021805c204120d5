"""Labelled texts and words: how rows become examples, and their tokens those of transformers' own tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from peftctl.data.chat import Chat
from peftctl.data.formats import recognise
from peftctl.data.sources import read
from peftctl.errors import DataError
from tests.runs import CONFIGS

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "red",
    "boat",
    "##house",
    "##s",
    "on",
    "the",
    "lake",
    ".",
    "two",
    "##y",
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as BERT has it."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **names}))
    return folder


def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_texts_and_pairs_are_those_of_transformers(bert: Path) -> None:
    chat, other = Chat(bert), theirs(bert)
    one = other("a red boathouse")
    assert chat.texts("a red boathouse") == (tuple(one["input_ids"]), ())
    two = other("a red boat", "on the lake.")
    assert chat.texts("a red boat", "on the lake.") == (tuple(two["input_ids"]), tuple(two["token_type_ids"]))
    assert sum(two["token_type_ids"]) == 5


def test_texts_between_which_nothing_would_stand_are_parted() -> None:
    chat = Chat(CONFIGS / "tokenizer")
    assert chat.texts("ab", "cd") == (chat.prompt("ab\ncd"), ())


@pytest.mark.parametrize("words", [["boathouse", "on", "the", "lake."], ["two", "boats", "."], ["redy"]])
def test_a_word_is_asked_at_its_first_token(words: list[str], bert: Path) -> None:
    encoded = theirs(bert)(words, is_split_into_words=True)
    owners = encoded.word_ids()
    ids, places = Chat(bert).words(words)
    assert ids == tuple(encoded["input_ids"])
    assert places == tuple(owners.index(number) for number in range(len(words)))


def test_words_of_bytes_carry_their_space() -> None:
    chat = Chat(CONFIGS / "tokenizer")
    words = ["Ada", "wrote", "naïvely", "."]
    ids, places = chat.words(words)
    assert chat.decode(ids) == " ".join(words)
    starts = [chat.decode(ids[:place]).rstrip() for place in places]
    assert starts == [" ".join(words[:n]) for n in range(len(words))]


def test_a_word_without_a_token_is_told(bert: Path) -> None:
    with pytest.raises(DataError, match="token 2, '\\\\u200b', is nothing to the tokenizer"):
        Chat(bert).words(["a", "\u200b", "boat"])


def rows(tmp_path: Path, *found: dict[str, Any]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_rows_become_examples(tmp_path: Path) -> None:
    path = rows(tmp_path, {"text": "x", "label": 3}, {"text": "x", "text_pair": "y", "label": True, "id": 7})
    found = recognise(read(path), wanted={"labelled"})
    assert [(e.texts, e.answers) for e in found.examples] == [(("x",), ("3",)), (("x", "y"), ("true",))]
    assert found.kind == "labelled" and found.unused == ("id",)
    path = rows(tmp_path, {"tokens": ["x", "y", "z"], "tags": ["B", None, 0]})
    (example,) = recognise(read(path)).examples
    assert (example.kind, example.texts, example.answers) == ("tagged", ("x", "y", "z"), ("B", "", "0"))


def test_columns_are_renamed_and_tables_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('sentence,kind\n"A boat.",good\n')
    found = recognise(read(tmp_path / "rows.csv"), columns={"text": "sentence", "label": "kind"}, wanted={"labelled"})
    assert [(e.texts, e.answers) for e in found.examples] == [(("A boat.",), ("good",))]
    (tmp_path / "rows.csv").write_text('tokens,tags\n"[""A"",""boat""]","[0,1]"\n')
    (example,) = recognise(read(tmp_path / "rows.csv")).examples
    assert example.texts == ("A", "boat") and example.answers == ("0", "1")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"tokens": ["a"], "tags": ["x", "y"]}, "there are 1 tokens and 2 tags"),
        ({"tokens": ["a", ""], "tags": ["x", "y"]}, "token 2 is empty"),
        ({"tokens": ["a"], "tags": [["x"]]}, "tag 1 must be a text"),
        ({"tokens": "a b", "tags": ["x", "y"]}, "tokens must be a list with something in it"),
        ({"text": "a", "label": None}, "no 'label'"),
    ],
)
def test_rows_of_another_form_are_told(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    (fault,) = recognise(read(rows(tmp_path, row)), wanted={"labelled", "tagged"}).faults
    assert said in str(fault)
