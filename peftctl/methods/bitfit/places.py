"""Which biases there are, and which of them are the query's and the MLP middle's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from peftctl.errors import TargetError
from peftctl.methods._biases import biased
from peftctl.methods._blocks import QUERY, every_block, last
from peftctl.skeleton import LINEAR, Module, Skeleton


def width(module: Module) -> int:
    """Size of the module's bias, had it or not."""
    return module.shapes["bias"][0] if "bias" in module.shapes else module.out_features


def places(skeleton: Skeleton, biases: str, add_missing: bool) -> list[Module]:
    """The modules whose bias is trained. Raises TargetError when it would be none."""
    wanted = _paper_half(skeleton) if biases == "query+mlp" else _all(skeleton)
    missing = [m for m in wanted if "bias" not in m.shapes]
    present = [m for m in wanted if "bias" in m.shapes]
    if missing and not add_missing and (not present or biases == "query+mlp"):
        raise TargetError(
            f"method.biases: {skeleton.architecture} has no bias {'at' if present else 'in'} {_names(missing)}; "
            f"add_missing: true would add {len(missing)} there, {sum(map(width, missing)):,} parameters"
        )
    return wanted if add_missing else present


def _all(skeleton: Skeleton) -> list[Module]:
    """Every module with a bias, and every linear without one but the output head."""
    present = {m.path for m in biased(skeleton, "method.biases")}
    return [m for m in skeleton.modules if m.path in present or (m.kind in LINEAR and m.path != skeleton.head)]


def _paper_half(skeleton: Skeleton) -> list[Module]:
    found = []
    for block in every_block(skeleton):
        query = [m for attending in block.attentions for m in attending.named(QUERY)]
        middle = [m for m in block.mlp if m.in_features == skeleton.dimensions.hidden and m != block.mlp[-1]]
        if len(query) != len(block.attentions) or not middle:
            lacking = "an MLP's middle" if query else "a query projection of its own"
            has = _names(block.mlp if query else block.attention + block.cross)
            raise TargetError(
                f"method.biases: query+mlp needs {lacking} in every layer, and {block.path} of "
                f"{skeleton.architecture} has {has}; use all"
            )
        found += [*query, *middle]
    return found


def _names(modules: Iterable[Module]) -> str:
    """`q_proj, k_proj`: each name once."""
    return ", ".join(Counter(map(last, modules))) or "nothing of the kind"
