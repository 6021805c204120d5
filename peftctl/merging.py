"""Merging an adapter into its base, and proving the result: the merged model must answer as base and adapter do."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftctl import base as bases
from peftctl import merge as streaming
from peftctl import model as models
from peftctl import storage
from peftctl.adapter import attach, filled
from peftctl.compute import Precision
from peftctl.errors import InputError, PeftctlError
from peftctl.formats import vocabularies
from peftctl.formats.shards import fingerprint
from peftctl.lazy import Unreadable
from peftctl.opened import Found, find
from peftctl.run_folder import peak_memory_bytes
from peftctl.seq2seq import call
from peftctl.walk import Walk, answers, first_apart, walk

# of the logits' norm: with every weight rounded to bfloat16 it was 0.03, though single logits were off by 0.13 of the
# largest
BROKEN = 0.1


def merge(
    adapters: Sequence[str],
    output: Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write base with adapters folded in as a model folder; several add up, the tokenizer is the first's.

    Raises Unfoldable, InputError, PeftctlError.
    """
    begun = time.perf_counter()
    streaming.refuse(output, dtype)
    several = [_found(adapter, base, trust_remote_code) for adapter in adapters]
    _of_one_base(several)
    found, weights = several[0], several[0].base.weights
    assert weights is not None
    finish = _tokenizer(found, weights)
    own = [one.adapter for one in several if one.adapter is not None]
    walked = walk(found.base, own, trust_remote_code=trust_remote_code) if verify else None
    model = models.empty(found.base, trust_remote_code=trust_remote_code) if walked is None else walked.model
    first, *further = [filled(model, one) for one in own] if walked is None else walked.attachments
    streaming.merge(
        weights,
        model,
        first,
        output,
        further=further,
        dtype=dtype,
        task=found.base.task,
        progress=progress,
        finish=finish,
    )
    difference, largest = _difference(several, output, trust_remote_code, walked) if verify else (None, None)
    return {
        "output": str(output),
        "seconds": time.perf_counter() - begun,
        "peak_memory_bytes": peak_memory_bytes(),
        "max_logit_difference": difference,
        "largest_logit": largest,
    }


def _found(adapter: str, base: str | None, trust_remote_code: bool) -> Found:
    found = find(adapter, base, trust_remote_code=trust_remote_code, tokenizer=False)
    if found.adapter is None or found.base.weights is None:
        raise InputError(f"{adapter} is a model, not an adapter: there is nothing to merge")
    return found


def _tokenizer(found: Found, weights: Path) -> Callable[[Path], object]:
    """What puts the adapter's own tokenizer, if it has one, into a folder that holds the base's."""
    assert found.adapter is not None
    own = found.adapter.folder
    if vocabularies.holds(own):
        return lambda folder: vocabularies.copy(own, folder)
    if not vocabularies.holds(weights):
        print(f"peftctl: {found.base.name} has no tokenizer, so the merged model has none: put one in", file=sys.stderr)
    return lambda folder: None


def _of_one_base(several: Sequence[Found]) -> None:
    """Refuse adapters that do not belong on one model."""
    first, *others = several
    assert first.adapter is not None and first.base.weights is not None
    for other in others:
        assert other.adapter is not None and other.base.weights is not None
        if (other.base.task, other.base.rows) != (first.base.task, first.base.rows):
            what = "they do not have the same head and the same new tokens"
        elif fingerprint(other.base.weights) != fingerprint(first.base.weights):
            what = f"the one's base is {first.base.name}, the other's {other.base.name}"
        else:
            continue
        raise InputError(f"{first.adapter.folder} and {other.adapter.folder} cannot be merged into one model: {what}")


def _difference(
    several: Sequence[Found], output: Path, trust_remote_code: bool, walked: Walk | None = None
) -> tuple[float, float]:
    """Largest difference between the logits of base + adapter and of the merged files read back, and largest logit.

    The files hold rounded weights, base + adapter does not: in bfloat16 that alone is some percent of a logit.
    `walked`: base + adapter, to be read from its files; without it, and where that cannot be, all is loaded.
    """
    found = several[0]
    merged = Found(bases.resolve(str(output))._replace(task=found.base.task), found.skeleton, None, found.tokenizer)
    expected, actual, place = _answers(several, merged, trust_remote_code, walked)
    error = actual - expected
    difference, largest = float(error.abs().max()), float(expected.abs().max())
    if not float(error.norm()) <= BROKEN * float(expected.norm()):
        storage.remove(output)  # nobody should serve it
        raise PeftctlError(
            f"{output} does not answer as base and adapter do: its logits differ by {difference:.2g}{place}; "
            "it was removed"
        )
    return difference, largest


def _answers(
    several: Sequence[Found], merged: Found, trust_remote_code: bool, walked: Walk | None
) -> tuple[Tensor, Tensor, str]:
    """The logits of base + adapter and of the merged files, and where they part."""
    found = several[0]
    if walked is not None:
        try:
            expected = answers(walked, _ids(found))
            other = walk(merged.base, (), trust_remote_code=trust_remote_code)
            actual = answers(other, _ids(found))
        except Unreadable:
            pass  # as remote code may do
        else:
            path = first_apart(expected, actual, BROKEN)
            return expected.logits, actual.logits, f", {path} being the first to differ" if path else ""
    return _logits(several, trust_remote_code), _logits([merged], trust_remote_code), ""


@torch.no_grad()
def _logits(several: Sequence[Found], trust_remote_code: bool) -> Tensor:
    found, precision = several[0], Precision(compute="float32")
    model = models.load(found.base, precision, "cpu", 0, trust_remote_code=trust_remote_code)
    for one in several:
        if one.adapter is not None:
            attachment = attach(model, one.adapter.method, one.adapter.config, 0).eval()
            attachment.load(one.adapter.tensors, str(one.adapter.folder))
    # one by one: a head that reads the last token asks what padding is where there are several
    logits: list[Tensor] = [model(**call(model, row[None])).logits.float() for row in _ids(found)]
    return torch.cat(logits)


def _ids(found: Found) -> Tensor:
    """Random tokens, (2, 24)."""
    return torch.randint(0, found.skeleton.dimensions.vocabulary, (2, 24), generator=torch.Generator().manual_seed(0))
