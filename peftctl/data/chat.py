"""The tokenizer with its chat template: dialogues and plain texts to token ids and label weights, and back.

It is made from a tokenizer's folder with `tokenizers` alone, which takes milliseconds where transformers takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from peftctl.composed import templates
from peftctl.data.spans import Dialogue, Span, Trained, ending, learnt
from peftctl.data.template import Template
from peftctl.data.templates import Chosen, needs, with_system
from peftctl.errors import DataError, FormatError
from peftctl.row import Message

TEMPLATE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"
COPIED = ("tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")

Encoded = tuple[tuple[int, ...], tuple[float, ...]]


class Chat:
    """Encodes what objectives ask for; see `objectives.base.Encoder`.

    `tokens`: special tokens by name. `eos_ids`: the ids that end an answer, the end-of-turn token among them.
    `opening`: what the tokenizer begins a text with. `vocabulary`: one more than the largest id. `template`: None for a
    tokenizer without one.
    """

    def __init__(
        self,
        folder: str | Path,
        template: str | Chosen | None = None,
        now: datetime | None = None,
        system: str | None = None,
    ) -> None:
        """`template`: to use in place of the folder's. `system`: what dialogues without a system prompt begin with.

        Raises FormatError: no tokenizer in the folder; DataError: a template that does not suit it.
        """
        self.folder = Path(folder)
        self.tokenizer = _tokenizer(self.folder)
        config = _json(self.folder / CONFIG)
        self.tokens = _special_tokens(config, _json(self.folder / "special_tokens_map.json"))
        self.system = system
        self.opening = self._opening()
        self.template = self._compiled(template if template is not None else _template(self.folder, config), now)
        self.vocabulary = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.special = _pattern([*self._added(), *self.tokens.values()])
        self.bos = self.tokenizer.token_to_id(self.tokens.get("bos_token", ""))
        self.eos = self.tokenizer.token_to_id(self.tokens.get("eos_token", ""))
        self.eos_ids = self._eos_ids()

    def dialogue(
        self, messages: Sequence[Message], trained: Trained = "assistant", tools: Sequence[Any] = ()
    ) -> Encoded:
        """Ids and label weights of the rendered dialogue. Raises DataError.

        `trained`: `assistant`, `last`, `all`, or the roles whose turns are learnt; `tools`: for the template.
        """
        text, spans = learnt(Dialogue(self._templated(), messages, self.special, tools), trained)
        return self._label(text, spans)

    def completion(self, prompt: str, answer: str) -> Encoded:
        """Ids and label weights of a plain prompt and its answer, end-of-text token included. Raises DataError."""
        self._plain("a plain prompt")
        if self.eos is None:
            raise DataError(f"the tokenizer {self.folder} has no eos_token, so no answer can end; set it in {CONFIG}")
        before = self.prompt(prompt)
        after = self._continuation(prompt, answer)
        after = after if after[-1:] == (self.eos,) else (*after, self.eos)
        return (*before, *after), (0.0,) * len(before) + (1.0,) * len(after)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text as the tokenizer itself gives them, with what it puts around one."""
        return tuple(self.tokenizer.encode(text).ids)

    def text(self, text: str) -> Encoded:
        """Ids and label weights of a text, all of which is learnt: opened as a prompt is, its end included."""
        self._plain("raw text")
        ids = self.prompt(text)
        if self.eos is not None and ids[-1:] != (self.eos,):
            ids = (*ids, self.eos)
        return ids, (1.0,) * len(ids)

    def texts(self, first: str, second: str | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of a text, or of a pair, with the special tokens that the tokenizer puts around and between them; and
        which of the two each token belongs to, nothing where it is all one. Texts between which nothing would stand
        are parted by a line break.
        """
        whole = self.tokenizer.encode(first, second, add_special_tokens=True)
        if second is None:
            return self._opened(tuple(whole.ids)), ()
        if len(whole.ids) <= len(self._ids(first)) + len(self._ids(second)) + len(self.opening):
            return self.texts(f"{first}\n{second}")
        return tuple(whole.ids), tuple(whole.type_ids) if any(whole.type_ids) else ()

    def words(self, words: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of words with spaces between them, special tokens around them, and the index of each word's first token.

        Raises DataError for a word without a token.
        """
        whole = self.tokenizer.encode(" ".join(words), add_special_tokens=True)
        real = [i for i, (start, end) in enumerate(whole.offsets) if end > start]
        places, start, at = list[int](), 0, 0
        for number, word in enumerate(words, 1):
            end = start + len(word)
            while at < len(real) and whole.offsets[real[at]][1] <= start:
                at += 1
            if at == len(real) or whole.offsets[real[at]][0] >= end:
                raise DataError(f"token {number}, {word!r}, is nothing to the tokenizer")
            places.append(real[at])
            start, at = end + 1, at + 1
        return tuple(whole.ids), tuple(places)

    def prompt(self, text: str) -> tuple[int, ...]:
        """Ids of a plain prompt: with what the tokenizer opens a text with (BOS), once."""
        return self._opened(self._ids(text))

    def _opened(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        return ids if ids[: len(self.opening)] == self.opening else (*self.opening, *ids)

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> tuple[int, ...]:
        """Ids of a dialogue up to where the assistant's next answer begins. Raises DataError."""
        return self._ids(self._templated().render(messages, prompt=True, tools=tools).text)

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of some ids; with `special`, special tokens are written out."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=not special)
        return text

    def token(self, index: int) -> str:
        """The token of an id, as the vocabulary spells it."""
        return self.tokenizer.id_to_token(index) or f"<{index}>"

    @property
    def pad_is_eos(self) -> bool:
        """No harm here, as nothing is padded and EOS stays a label."""
        pad = self.tokens.get("pad_token")
        return pad is not None and pad == self.tokens.get("eos_token")

    def fingerprint(self) -> str:
        """The sha256 of all that an encoding, or a refusal's words, depends on."""
        told = self.template.now.isoformat() if self.template and "strftime_now" in self.template.source else None
        source = self.template.source if self.template else None
        rest = json.dumps([str(self.folder), self.tokens, self.eos_ids, source, told])
        return hashlib.sha256((self.folder / "tokenizer.json").read_bytes() + rest.encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files and write the template that was used."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*COPIED, "vocab.txt", "tokenizer.model"):
            if (self.folder / name).is_file() and folder.resolve() != self.folder.resolve():
                shutil.copyfile(self.folder / name, folder / name)
        if self.template is not None:
            (folder / TEMPLATE).write_bytes(self.template.source.encode("utf-8"))
            config = _json(folder / CONFIG)
            if config.pop("chat_template", None) is not None:  # one truth: the file beside it
                (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _compiled(self, wanted: str | Chosen | None, now: datetime | None) -> Template | None:
        if not wanted:
            if self.system is not None:
                raise DataError(f"data.system: the tokenizer {self.folder} has no chat template that shows it")
            return None
        found = wanted if isinstance(wanted, Chosen) else Chosen(wanted, f"the chat template of {self.folder}")
        source, missing = found.source, [token for token in needs(found.source) if not self._has(token)]
        if missing:
            lacking = f"{found.name} needs {', '.join(missing)}, which the tokenizer {self.folder} does not have"
            raise DataError(f"{lacking}; model.add_tokens gives a base new tokens")
        bos = self.tokens.get("bos_token", "")
        if found.shipped and self.opening and self.opening == (self.tokenizer.token_to_id(bos),):
            source = "{{- bos_token -}}" + source
        if self.system is not None:
            source = with_system(source, self.system)
        return Template(source, self.tokens, found.name, now)

    def _has(self, token: str) -> bool:
        return token in self.tokens or self.tokenizer.token_to_id(token) is not None

    def _plain(self, what: str) -> None:
        if self.system is not None:
            raise DataError(f"data.system has no place in {what}, which no chat template renders; leave it out")

    def _templated(self) -> Template:
        if self.template is None:
            raise DataError(
                f"the tokenizer {self.folder} has no chat template, so messages cannot be rendered; "
                f"set data.chat_template ({', '.join(templates())}), put a {TEMPLATE} beside its tokenizer.json, "
                "or use prompt + completion data"
            )
        return self.template

    def _label(self, text: str, spans: Sequence[Span]) -> Encoded:
        """A token is a label when it starts inside a span."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        starts = [start for start, _ in encoding.offsets]  # in order, as the tokens are
        weights: list[float] = []
        for span in spans:
            first, after = (bisect_left(starts, edge, lo=len(weights)) for edge in (span.start, span.stop))
            weights += [0.0] * (first - len(weights)) + [span.weight] * (after - first)
        return tuple(encoding.ids), (*weights, *[0.0] * (len(starts) - len(weights)))

    def _continuation(self, prompt: str, answer: str) -> tuple[int, ...]:
        """Ids of the answer after the prompt's own ids, which stay as they are when the model is asked."""
        before, whole = self._ids(prompt), self._ids(prompt + answer)
        if whole[: len(before)] == before:
            return whole[len(before) :]
        alone = self._ids(answer)
        if self.decode((*before, *alone), special=True) != self.decode(whole, special=True):
            raise DataError("prompt and completion cannot be told apart in tokens; begin the completion with the space")
        return alone

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _opening(self) -> tuple[int, ...]:
        """What the tokenizer itself puts before a text."""
        plain, whole = self._ids("a"), tuple(self.tokenizer.encode("a", add_special_tokens=True).ids)
        starts = range(len(whole) - len(plain) + 1)
        return next((whole[:start] for start in starts if whole[start : start + len(plain)] == plain), ())

    def _added(self) -> list[str]:
        return [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]

    def _eos_ids(self) -> tuple[int, ...]:
        found: list[Any] = [self.eos]
        generation = _json(self.folder / "generation_config.json").get("eos_token_id")
        found += generation if isinstance(generation, list) else [generation]
        if self.template is not None:
            try:
                found.append(self.tokenizer.token_to_id(ending(self.template, self.special)))
            except DataError:
                pass  # a template that wants more than one question says so when rows are rendered
        return tuple(dict.fromkeys(index for index in found if isinstance(index, int)))


def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FormatError(f"{folder} has no tokenizer.json; load the tokenizer with transformers and save it there")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise FormatError(f"{path} is not a tokenizer: {error}") from None
    tokenizer.no_truncation()  # a file may carry a limit, which would cut rows without a word
    tokenizer.no_padding()
    return tokenizer


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like, whether written as text or as an object; the first source wins."""
    tokens: dict[str, str] = {}
    for name, value in (item for source in sources for item in source.items()):
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens.setdefault(name, content)
    return tokens


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (folder / TEMPLATE).is_file():
        try:
            return (folder / TEMPLATE).read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{folder / TEMPLATE} is not UTF-8 at byte {error.start}") from None
    value = config.get("chat_template")
    if isinstance(value, list):  # several by name, as older files have them
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the tokens, the longest first; not the runs of white space that some vocabularies add."""
    marks = sorted({token for token in tokens if token.strip()}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, marks)) or r"(?!)")
