"""Opening what a command is pointed at: a model, an adapter or a run becomes a policy with its tokenizer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from peftctl import base as bases
from peftctl import model as models
from peftctl.compute import AUTO, Precision
from peftctl.data.chat import Chat
from peftctl.data.sides import chat_of
from peftctl.errors import FormatError, ModelError
from peftctl.task import task_of

if TYPE_CHECKING:
    from peftctl.formats.peft import Adapter
    from peftctl.methods.attachment import Attachment
    from peftctl.policy import Layout, Policy
    from peftctl.skeleton import Skeleton


class Found(NamedTuple):
    """What lies at a path, before anything is loaded. `adapter` is None for a plain model.

    `tokenizer` is None where there is no tokenizer.json and none was asked for.
    """

    base: bases.Base
    skeleton: Skeleton
    adapter: Adapter | None
    tokenizer: Path | None


class Opened(NamedTuple):
    found: Found
    policy: Policy
    chat: Chat


def find(
    path: str,
    base: str | None = None,
    *,
    trust_remote_code: bool = False,
    tokenizer: bool = True,
    notice: Callable[[str], None] = lambda text: print(f"peftctl: {text}", file=sys.stderr),
) -> Found:
    """What lies at a path: a run (its adapter), an adapter, or a model. `base` replaces the base that it names.

    An adapter that was trained on other weights is refused, unless it was `base` that named them: then it is noticed.
    Nor is it found without a `tokenizer`, unless none is asked for. Raises InputError.
    """
    from peftctl.adapter import fit
    from peftctl.formats import origin, peft

    folder = adapter_folder(path)
    if folder is None:
        resolved = bases.resolve(path, trust_remote_code=trust_remote_code)
        resolved = resolved._replace(task=task_of(resolved.settings()))
        skeleton = models.skeleton(resolved, trust_remote_code=trust_remote_code)
        return Found(resolved, skeleton, None, _tokenizer(resolved.tokenizer, path, tokenizer))
    name, revision = origin.base_of(folder)
    if base is None and name is None:
        raise FormatError(f"{folder} does not say what its base is: name it with --base")
    resolved = bases.resolve(base or str(name), None if base else revision, trust_remote_code=trust_remote_code)
    resolved = origin.asked(resolved, folder)
    skeleton = models.skeleton(resolved, trust_remote_code=trust_remote_code)
    own = folder if (folder / "tokenizer.json").is_file() else resolved.tokenizer
    adapter = peft.read(folder, skeleton)
    if (unlike := origin.other_base(folder, adapter.trained_on, adapter.fingerprint, resolved)) is not None:
        if base is None:
            raise ModelError(f"{unlike}: name the base with --base; what it names is used all the same")
        notice(f"{unlike}; going on with what --base names")
    trust = trust_remote_code
    fit(resolved, adapter.method, adapter.config, adapter.tensors, str(folder), trust_remote_code=trust)
    return Found(resolved, skeleton, adapter, _tokenizer(own, path, tokenizer))


def open(
    found: Found,
    *,
    device: str = "auto",
    precision: Precision = AUTO,
    seed: int = 0,
    trust_remote_code: bool = False,
    notice: Callable[[str], None] = lambda text: None,
) -> Opened:
    """Load what was found, as a policy in eval mode. `notice`: as of `model.load`."""
    from peftctl.adapter import attach

    device = models.device(device)
    model = models.load(found.base, precision, device, seed, trust_remote_code=trust_remote_code, notice=notice)
    attachment = None
    if found.adapter is not None:
        attachment = attach(model, found.adapter.method, found.adapter.config, seed)
        attachment.load(found.adapter.tensors, str(found.adapter.folder))
    policy = policy_of(model, attachment, found.skeleton.dimensions.layers)
    return Opened(found, policy.eval(), chat_of(found.base.start(), found.tokenizer))


def policy_of(
    model: Any, attachment: Attachment | None, layers: int, layout: str = "auto", fixed: Layout | None = None
) -> Policy:
    """The policy over a model and its deltas. The layout is chosen on the bare base, unless one is `fixed`."""
    from peftctl.head import head_of
    from peftctl.layout import choose
    from peftctl.methods.attachment import Attachment
    from peftctl.policy import Policy
    from peftctl.scores import task_head_of

    attachment = attachment if attachment is not None else Attachment()
    with attachment.disabled():
        chosen = fixed or choose(model, layers, layout)
        return Policy(model, attachment, chosen, head_of(model), task_head_of(model))


def adapter_folder(path: str) -> Path | None:
    """The adapter that a path means: of a run, its result; None for what is no adapter."""
    folder = Path(path)
    if (folder / "run.json").is_file():
        if not (folder / "adapter").is_dir():
            status = _status(folder / "run.json")
            raise ModelError(f"{path} is a run without a result ({status}): finish it with peftctl train --resume")
        return folder / "adapter"
    return folder if (folder / "adapter_config.json").is_file() else None


def _status(path: Path) -> str:
    try:
        return str(json.loads(path.read_bytes())["status"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "unfinished"


def _tokenizer(folder: Path | None, path: str, needed: bool) -> Path | None:
    if folder is None and needed:
        raise ModelError(
            f"{path} has no tokenizer.json: put the tokenizer's files beside the model, or name a tokenizer"
        )
    return folder
