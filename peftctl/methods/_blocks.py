"""Where things sit in a transformer: its blocks, their attention, MLP and norms, read off the skeleton table.

Structural rules, no class names: a new architecture of a usual shape is served, an unusual one is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from peftctl.errors import TargetError
from peftctl.skeleton import LINEAR, Module, Skeleton

ATTENTION_OUTPUT = frozenset({"o_proj", "out_proj", "out_lin", "c_proj", "dense", "wo", "o"})
QUERY = frozenset({"q_proj", "query", "q_lin", "q"})
KEY = frozenset({"k_proj", "key", "k_lin", "k"})
VALUE = frozenset({"v_proj", "value", "v_lin", "v"})


class Block(NamedTuple):
    """One layer. Every module carries its whole path; norms are those as wide as the hidden state."""

    path: str
    attention: tuple[Module, ...]  # linears inside the attention
    mlp: tuple[Module, ...]  # linears outside it
    norms: tuple[Module, ...]  # norms outside it, in the order of definition

    def named(self, names: Iterable[str]) -> tuple[Module, ...]:
        """The attention's linears of these names."""
        return tuple(m for m in self.attention if last(m) in names)


def last(module: Module) -> str:
    return module.path.rsplit(".", 1)[-1]


def blocks(skeleton: Skeleton) -> tuple[Block, ...]:
    """The blocks of the one stack of layers. Raises TargetError for none or several."""
    stacks = _stacks(skeleton)
    if len(stacks) != 1:
        found = f"{len(stacks)} stacks of layers ({', '.join(stacks)})" if stacks else "no stack of layers"
        raise TargetError(f"method: {skeleton.architecture} has {found}; this method needs one")
    members: dict[str, list[Module]] = {}
    for module in _inside(skeleton.modules, stacks[0]):
        index = module.path[len(stacks[0]) + 1 :].split(".")[0]
        members.setdefault(f"{stacks[0]}.{index}", []).append(module)
    if len(members) != skeleton.dimensions.layers:
        raise TargetError(
            f"method: {skeleton.architecture} has {skeleton.dimensions.layers} layers but {len(members)} blocks in "
            f"{stacks[0]}; this method needs one block a layer"
        )
    return tuple(_block(path, modules, skeleton.dimensions.hidden) for path, modules in members.items())


def normalises_after(skeleton: Skeleton) -> bool:
    """Whether blocks end in their norm (BERT) instead of a final norm following all of them (GPT-2, Llama)."""
    (stack,) = _stacks(skeleton)
    return not any(m.kind == "Norm" and f"{stack}.".startswith(f"{_parent(m.path)}.") for m in skeleton.modules)


def keys_and_values(skeleton: Skeleton, block: Block) -> tuple[Module, ...]:
    """The projections that make a block's keys and values: two, or one fused with the query's; none if not found."""
    size = skeleton.dimensions
    keys, values = block.named(KEY), block.named(VALUE)
    if len(keys) == len(values) == 1:
        return keys + values
    fused = (size.heads + 2 * size.kv_heads) * size.head_dim
    found = tuple(m for m in block.attention if m.out_features == fused)
    return found if len(found) == 1 and len(block.attention) == 2 else ()


def down_projection(skeleton: Skeleton, block: Block) -> Module | None:
    """The linear that ends a block's MLP, None where there is no single one."""
    found = [m for m in block.mlp if m.out_features == skeleton.dimensions.hidden]
    if len(found) > 1 and len(block.mlp) <= 3:  # an MLP as wide as the hidden state: what ends it is defined last
        found = found[-1:]
    return found[0] if len(found) == 1 else None


def input_embedding(skeleton: Skeleton) -> Module:
    """The lookup of the tokens. Raises TargetError where it is not found."""
    rows = skeleton.dimensions.vocabulary
    found = [m for m in skeleton.modules if m.kind == "Embedding" and m.in_features == rows]
    if not found:
        raise TargetError(f"method: {skeleton.architecture} has no embedding of its {rows:,} tokens")
    return found[0]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _stacks(skeleton: Skeleton) -> list[str]:
    """The outermost lists of modules that hold linears."""
    found: list[str] = []
    for module in skeleton.modules:
        if module.kind != "ModuleList" or any(module.path.startswith(f"{path}.") for path in found):
            continue
        if any(m.kind in LINEAR for m in _inside(skeleton.modules, module.path)):
            found.append(module.path)
    return found


def _inside(modules: Iterable[Module], path: str) -> list[Module]:
    return [m for m in modules if m.path.startswith(f"{path}.")]


def _block(path: str, modules: list[Module], hidden: int) -> Block:
    def first(module: Module) -> str:
        return module.path[len(path) + 1 :].split(".")[0]

    linears = [m for m in modules if m.kind in LINEAR]
    attention = {first(m) for m in linears if "attn" in first(m) or "attention" in first(m)}
    return Block(
        path,
        attention=tuple(m for m in linears if first(m) in attention),
        mlp=tuple(m for m in linears if first(m) not in attention),
        norms=tuple(
            m for m in modules if m.kind == "Norm" and first(m) not in attention and m.shapes.get("weight") == (hidden,)
        ),
    )
