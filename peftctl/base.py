"""Finding a base: a hub id, a local folder, a GGUF file or a bare architecture becomes files on this machine.

Torch-free: what the config says is judged here, before any weight is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from peftctl.errors import ModelError
from peftctl.skeleton import NewRows
from peftctl.task import Task

WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
SMALL = ["config.json", "generation_config.json", "tokenizer*", "*.jinja", "vocab*", "merges.txt", "special_tokens*"]
SMALL += ["added_tokens.json", "*.model", "*.spm", "*.tiktoken", "*.codes", "*.bpe"]  # tokenizers of older kinds
Need = Literal["config", "tokenizer", "weights"]  # what is asked of a base; each includes the one before it
FILES: dict[Need, list[str]] = {"config": ["config.json"], "tokenizer": SMALL, "weights": SMALL + WEIGHTS}
SAMPLE = 1 << 20  # bytes at either end of a weight file
MOST_PARTS = 4096  # layers or experts that a config may ask for; more would be built for hours
# what makes a model more than text: refused by name, as no method here knows where to sit in it
OTHER_SENSES = {"vision_config": "a vision-language", "audio_config": "an audio", "speech_config": "a speech"}


class Base(NamedTuple):
    """A base on this machine. `weights` is None for a bare architecture, whose weights are drawn at random."""

    name: str  # as the recipe says it
    revision: str | None  # commit of a hub model
    config: Path  # its config.json
    weights: Path | None  # the folder that holds the safetensors
    tokenizer: Path | None  # the folder that holds tokenizer.json
    task: Task | None = None  # what it is asked for; None for tokens
    rows: NewRows | None = None  # tokens that it is to be given

    @property
    def vocabulary(self) -> int | None:
        """Rows of its embeddings, new ones included, as far as its config says it."""
        own = self.settings().get("vocab_size")
        return self.rows.total if self.rows is not None else own if isinstance(own, int) else None

    @property
    def positions(self) -> int | None:
        """How many positions it has for a row, of an encoder-decoder on either side; None where it says nothing."""
        # T5's n_positions is what it was trained with: its positions are relative
        names = ("max_position_embeddings",) if self.two_sided else ("n_positions", "max_position_embeddings")
        settings = self.settings()
        return min((settings[key] for key in names if isinstance(settings.get(key), int)), default=None)

    @property
    def two_sided(self) -> bool:
        """Whether it is an encoder-decoder."""
        return bool(self.settings().get("is_encoder_decoder"))

    def start(self) -> int | None:
        """The token that its decoder begins with; None for a decoder alone. Raises ModelError where none is named."""
        if not self.two_sided:
            return None
        found = self.settings().get("decoder_start_token_id")
        if not isinstance(found, int):
            raise ModelError(f"{self.config} names no decoder_start_token_id, which an encoder-decoder needs; add it")
        return found

    def settings(self) -> dict[str, Any]:
        """The parsed config.json."""
        settings: dict[str, Any] = json.loads(self.config.read_text("utf-8"))
        return settings


def cache_folder() -> Path:
    """Where conversions and tables are kept: $PEFTCTL_CACHE, else peftctl/ in the user's cache folder."""
    if "PEFTCTL_CACHE" in os.environ:
        return Path(os.environ["PEFTCTL_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "peftctl"


def resolve(
    name: str,
    revision: str | None = None,
    tokenizer: str | None = None,
    *,
    need: Need = "weights",
    trust_remote_code: bool = False,
) -> Base:
    """The base of that name, with as much as is needed of it fetched or converted.

    Raises ModelError in one line that says what to do.
    """
    path = Path(name).expanduser()
    if name.endswith(".json"):
        base = Base(name, None, _existing(path), None, None)
    elif name.endswith(".gguf") and need == "config":
        base = Base(name, None, _described(_existing(path)), None, None)
    elif name.endswith(".gguf"):
        folder = _converted(_existing(path))
        base = Base(name, None, folder / "config.json", folder, folder)
    elif path.is_dir():
        base = _folder(name, path, None, need)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"there is no folder {name}")
    else:
        base = _hub(name, revision, need)
    if tokenizer is not None:
        base = base._replace(tokenizer=_existing(Path(tokenizer)))
    _judge(base, trust_remote_code)
    return base


def fingerprint(base: Base) -> str:
    """sha256 of the config and of each weight file's size, header and end: not all of what may be many gigabytes."""
    digest = hashlib.sha256(base.config.read_bytes())
    for path in sorted(base.weights.glob("*.safetensors")) if base.weights is not None else ():
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ModelError(f"model: there is no {path}")
    return path


def _converted(gguf: Path) -> Path:
    """A GGUF base as a plain folder, converted once and kept."""
    from peftctl.formats.gguf import convert

    folder = cache_folder() / "gguf" / _kept_as(gguf)
    if not folder.exists():
        convert(gguf, folder)
    return folder


def _described(gguf: Path) -> Path:
    """The config that a GGUF file's header means, read once and kept."""
    from peftctl.formats.gguf import architecture

    path = cache_folder() / "gguf-configs" / f"{_kept_as(gguf)}.json"
    return path if path.exists() else _write(path, architecture(gguf))


def _kept_as(gguf: Path) -> str:
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    return f"{gguf.stem}-{key}"


def _write(path: Path, text: str) -> Path:
    """A small file of the cache, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)
    return path


def _folder(name: str, folder: Path, revision: str | None, need: Need) -> Base:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json, so it is no model")
    if need == "weights" and not any(folder.glob("*.safetensors")):
        found = "only pickles (.bin), which are never read" if any(folder.glob("*.bin")) else "no weights"
        raise ModelError(f"{folder} holds {found}; *.safetensors files are needed")
    has_tokenizer = (folder / "tokenizer.json").is_file()
    return Base(name, revision, folder / "config.json", folder, folder if has_tokenizer else None)


def _hub(name: str, revision: str | None, need: Need) -> Base:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=FILES[need]))
    except GatedRepoError:
        raise ModelError(f"{name} is gated: accept its terms on the hub, then set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise ModelError(f"{name} has no revision {revision!r}: check model.revision") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"there is no folder {name!r}, and the hub has no such model: check the name; a private one needs HF_TOKEN"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
        raise ModelError(
            f"there is no folder {name!r}, and as a hub model it is not on this machine and the hub cannot be reached: "
            f"connect, or name a local folder"
        ) from None
    except ValueError as error:
        raise ModelError(f"{name!r} is neither a folder nor a hub id: {error}") from None
    return _folder(name, folder, folder.name, need)


def _judge(base: Base, trust_remote_code: bool) -> None:
    """Refuse, by what the config says, what cannot be served or would run code."""
    try:
        settings = base.settings()
    except OSError as error:
        raise ModelError(f"{base.config} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{base.config} is not JSON: {error}") from None
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise ModelError(f"{base.config} has no model_type, so it is no Hugging Face config")
    if not trust_remote_code and _brings_code(settings):
        raise ModelError(f"{base.name} brings its own code: read it, then pass --trust-remote-code if you trust it")
    for key, value in settings.items():
        if isinstance(value, int) and value > MOST_PARTS and ("layer" in key or "expert" in key):
            raise ModelError(f"{base.config} says {key} {value:,}: more than {MOST_PARTS:,} are not served")
    for key, sense in OTHER_SENSES.items():
        if key in settings:
            raise ModelError(f"{base.name} is {sense} model ({settings['model_type']}): only text models are served")


def _brings_code(settings: Any) -> bool:
    """Whether a config, or one inside it, names code: its own classes, or an implementation that lies on a hub."""
    left = [settings]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
            for key, own in value.items():
                hub = "implementation" in key and "/" in str(own)
                if key == "auto_map" or (key == "trust_remote_code" and own) or hub:
                    return True
        elif isinstance(value, list):
            left += value
    return False


def shrink(base: Base, vocabulary: int) -> Base:
    """A bare architecture of the same family with 2 narrow layers; for smoke runs."""
    settings = _shrunk(base.settings(), vocabulary)
    text = json.dumps(settings, indent=1, sort_keys=True)
    path = cache_folder() / "shrunk" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    return base._replace(config=_write(path, text), weights=None)


SMALL_VALUES = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 256),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "moe_intermediate_size", "n_inner"), 512),
    **dict.fromkeys(("d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 512),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("num_local_experts", "num_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 4096),
    "head_dim": 64,
    "rotary_dim": 32,
}


def _shrunk(settings: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    small = {key: SMALL_VALUES.get(key, value) if value is not None else None for key, value in settings.items()}
    for key in ("layer_types", "mlp_layer_types"):
        if isinstance(small.get(key), list):
            small[key] = list(small[key] or [])[:2]
    tokens = {"vocab_size": vocabulary, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    if settings.get("is_encoder_decoder"):
        tokens |= {"decoder_start_token_id": 0}
    drop = ("quantization_config", "_name_or_path", "_model_name_or_path", "forced_bos_token_id", "forced_eos_token_id")
    return {key: value for key, value in (small | tokens | {"dtype": "float32"}).items() if key not in drop}
