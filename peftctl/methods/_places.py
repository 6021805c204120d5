"""Where small networks sit in a block: where adapter-hub's `double_seq_bn`, `seq_bn` and `par_bn` compute the same."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

from peftctl.errors import TargetError
from peftctl.methods._blocks import ATTENTION_OUTPUT, Block, down_projection, every_block, normalises_after
from peftctl.skeleton import Skeleton


class Place(NamedTuple):
    path: str
    source: str | None = None  # whose first input the network reads, where that is not its own place
    normalised: bool = False  # the place is a norm that comes after the residual: the network adds before it


def places(skeleton: Skeleton, preset: str) -> list[Place]:
    """The places of a preset, block by block. Raises TargetError where an architecture has none."""
    found = every_block(skeleton)
    after = normalises_after(skeleton)
    return [place for block in found for place in _in_block(skeleton, block, preset, after)]


def _in_block(skeleton: Skeleton, block: Block, preset: str, after: bool) -> list[Place]:
    if preset == "houlsby":
        attentions = [Place(_attention_output(skeleton, attending)) for attending in block.attentions]
        return [*attentions, Place(_mlp_output(skeleton, block))]
    if preset == "parallel":
        return [Place(_mlp_output(skeleton, block), source=_mlp_source(skeleton, block, after))]
    if not after:
        return [Place(block.path)]
    if not block.norms:
        _refuse(skeleton, block, "norm after its MLP")
    return [Place(block.norms[-1].path, normalised=True)]


def _attention_output(skeleton: Skeleton, block: Block) -> str:
    found = [m for m in block.named(ATTENTION_OUTPUT) if m.out_features == skeleton.dimensions.hidden]
    if len(found) != 1:
        _refuse(skeleton, block, "single output projection of its attention")
    return found[0].path


def _mlp_output(skeleton: Skeleton, block: Block) -> str:
    found = down_projection(skeleton, block)
    if found is None:
        _refuse(skeleton, block, "single output projection of its MLP")
    return found.path


def _mlp_source(skeleton: Skeleton, block: Block, after: bool) -> str:
    """The module whose input is the residual stream as it stands before the MLP."""
    if after:  # the residual was normalised before, so the MLP reads it as it is
        return next(m.path for m in block.mlp if m.in_features == skeleton.dimensions.hidden)
    named = [m for m in block.norms if "pre_feedforward" in m.path]  # Gemma 2 and 3 have four norms
    found = named or (list(block.norms[-1:]) if len(block.norms) <= 1 + len(block.attentions) else [])
    if len(found) != 1:
        _refuse(skeleton, block, "single norm before its MLP")
    return found[0].path


def _refuse(skeleton: Skeleton, block: Block, lacking: str) -> NoReturn:
    raise TargetError(
        f"method.preset: {skeleton.architecture} has no place for it: {block.path} has no {lacking}; "
        "try another preset or method"
    )
