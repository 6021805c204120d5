"""What a method is: a torch-free declaration (schema, traits, count) and the deltas it attaches.

A method is a folder here that exports `METHOD`. Its `__init__.py` is torch-free; `delta.py` holds the modules and is
imported by `attach` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from peftctl.skeleton import Skeleton

if TYPE_CHECKING:
    from torch import nn

    from peftctl.methods.attachment import Attachment


class MethodConfig(BaseModel):
    """What every method's block in a recipe has."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    init_from: str | None = None  # an adapter folder to continue from; a path, relative to the recipe
    save_modules: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="modules that are trained and saved whole beside the adapter"
    )

    def tokenized(self, encode: Callable[[str], Sequence[int]]) -> MethodConfig:
        """The same with whatever text is in it encoded, for a start that needs it. Raises InputError."""
        return self

    def meaning(self, skeleton: Skeleton) -> dict[str, Any]:
        """What of these settings decides what the saved tensors compute, beside their names and shapes."""
        return {}


C = TypeVar("C", bound=MethodConfig)


class Traits(NamedTuple):
    """What the rest of the program may ask about a method instead of its name."""

    starts_as_identity: bool = True  # step 0 computes the base, bit for bit
    foldable: bool = True  # the change fits into the plain weights
    needs_cache: bool = False  # serves keys and values: no gradient checkpointing, needs an attention cache to generate
    low_rank: bool = False
    virtual_tokens: int = 0  # positions that are taken before a row's first token


class Counted(NamedTuple):
    """How many numbers a method would train at each place, and how it says where."""

    places: dict[str, int]  # path (or the name of a shared tensor) -> trained parameters
    summary: str  # "84 modules in 12 of 12 layers: q_proj, ..."

    @property
    def total(self) -> int:
        return sum(self.places.values())


class Exchange(NamedTuple):
    """How a method's tensors are written for, and read from, the `peft` package. Pure functions on names and tensors.

    `write(config, skeleton, tensors) -> (adapter_config keys, tensors under peft's names)`
    `read(adapter_config, skeleton, tensors) -> (keys of the recipe's method block, tensors under our names)`
    `claims(adapter_config)`: whether a file of this `peft_type` is this method's, where several share one.
    `holds(skeleton)`: whether peft computes the same on such a base.
    """

    peft_type: str
    write: Callable[[Any, Skeleton, Mapping[str, Any]], tuple[dict[str, Any], dict[str, Any]]]
    read: Callable[[Mapping[str, Any], Skeleton, Mapping[str, Any]], tuple[dict[str, Any], dict[str, Any]]]
    claims: Callable[[Mapping[str, Any]], bool] = lambda keys: True
    holds: Callable[[Skeleton], bool] = lambda skeleton: True


Stored = Callable[[str], Any]  # a parameter of the base, by its full name
Write = Callable[[Any, Skeleton, Mapping[str, Any]], tuple[dict[str, Any], dict[str, Any]]]


@dataclass(frozen=True)
class Method(Generic[C]):
    """The one name that a method's folder exports.

    `likeness`: of a method that peft lacks, how it is written as another of peft's that computes the same; as
    `Exchange.write`, from the base's own values. Nothing reads it back: it is an adapter of that other method then.
    `count` raises TargetError where the method cannot serve the skeleton, and so does `attach`, by the same rules.
    """

    name: str
    summary: str
    paper: str
    config: type[C]
    traits: Callable[[C], Traits]
    count: Callable[[Skeleton, C], Counted]
    attach: Callable[[nn.Module, C], Attachment]
    exchange: Callable[[], Exchange] | None = field(default=None)
    likeness: Callable[[], Callable[[Stored], Write]] | None = field(default=None)
