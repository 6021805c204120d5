"""Where things sit in a transformer: its blocks, their attention, MLP and norms, read off the skeleton table.

Structural rules, no class names: a new architecture of a usual shape is served, an unusual one is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from peftctl.errors import TargetError
from peftctl.skeleton import LINEAR, Module, Skeleton

ATTENTION_OUTPUT = frozenset({"o_proj", "out_proj", "out_lin", "c_proj", "dense", "wo", "o"})
QUERY = frozenset({"q_proj", "query", "q_lin", "q"})
KEY = frozenset({"k_proj", "key", "k_lin", "k"})
VALUE = frozenset({"v_proj", "value", "v_lin", "v"})
CROSS = ("cross", "encoder_attn", "encdec")  # in the name of an attention that reads an encoder's answer


class Block(NamedTuple):
    """One layer. Every module carries its whole path; norms are those as wide as the hidden state."""

    path: str
    attention: tuple[Module, ...]  # linears inside the attention
    mlp: tuple[Module, ...]  # linears outside it
    norms: tuple[Module, ...]  # norms outside it, in the order of definition
    cross: tuple[Module, ...] = ()  # linears inside a second attention, which reads the encoder's answer

    @property
    def attentions(self) -> tuple[Block, ...]:
        """The block seen with each of its attentions alone."""
        return (self, self._replace(attention=self.cross)) if self.cross else (self,)

    def named(self, names: Iterable[str]) -> tuple[Module, ...]:
        """The attention's linears of these names."""
        return tuple(m for m in self.attention if last(m) in names)


def last(module: Module) -> str:
    return module.path.rsplit(".", 1)[-1]


def blocks(skeleton: Skeleton) -> tuple[Block, ...]:
    """The blocks of the one stack of layers. Raises TargetError for none or several."""
    return _in_stacks(skeleton, [skeleton.dimensions.layers])


def every_block(skeleton: Skeleton) -> tuple[Block, ...]:
    """The blocks of the one stack of layers, or of an encoder's and then its decoder's. Raises TargetError."""
    size = skeleton.dimensions
    return _in_stacks(skeleton, [size.encoder_layers, size.layers] if size.encoder_layers else [size.layers])


def _in_stacks(skeleton: Skeleton, layers: Sequence[int]) -> tuple[Block, ...]:
    stacks = _stacks(skeleton)
    if len(stacks) != len(layers):
        found = f"{len(stacks)} stacks of layers ({', '.join(stacks)})" if stacks else "no stack of layers"
        wanted = "one" if len(layers) == 1 else "an encoder's and a decoder's"
        raise TargetError(f"method: {skeleton.architecture} has {found}; this method needs {wanted}")
    return tuple(chain.from_iterable(_in_stack(skeleton, *each) for each in zip(stacks, layers, strict=True)))


def _in_stack(skeleton: Skeleton, stack: str, layers: int) -> Iterator[Block]:
    members: dict[str, list[Module]] = {}
    for module in _inside(skeleton.modules, stack):
        index = module.path[len(stack) + 1 :].split(".")[0]
        members.setdefault(f"{stack}.{index}", []).append(module)
    if len(members) != layers:
        raise TargetError(
            f"method: {skeleton.architecture} has {layers} layers but {len(members)} blocks in {stack}; "
            "this method needs one block a layer"
        )
    yield from (_block(path, modules, skeleton.dimensions.hidden) for path, modules in members.items())


def normalises_after(skeleton: Skeleton) -> bool:
    """Whether blocks end in their norm (BERT) instead of a final norm following all of them (GPT-2, Llama)."""
    stack = _stacks(skeleton)[-1]
    norms = [m for m in skeleton.modules if m.kind == "Norm" and "embed" not in last(m)]  # BART's is of embeddings
    return not any(f"{stack}.".startswith(f"{_parent(m.path)}.") for m in norms)


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
    linears = [m for m in modules if m.kind in LINEAR]
    attentions = {_attention(path, m) for m in linears} - {None}
    cross = {name for name in attentions if name is not None and any(word in name.lower() for word in CROSS)}
    inside = [m for m in linears if _attention(path, m) in attentions]
    return Block(
        path,
        attention=tuple(m for m in inside if _attention(path, m) not in cross),
        mlp=tuple(m for m in linears if m not in inside),
        norms=tuple(
            m
            for m in modules
            if m.kind == "Norm" and _attention(path, m) not in attentions and m.shapes.get("weight") == (hidden,)
        ),
        cross=tuple(m for m in inside if _attention(path, m) in cross),
    )


def _attention(block: str, module: Module) -> str | None:
    """The path within its block of the attention that a module is or lies in, None outside."""
    found = re.match(r"(?:[^.]+\.)*?[^.]*(?:attn|attention)[^.]*", module.path[len(block) + 1 :], re.IGNORECASE)
    return found.group() if found else None
