"""Encoded examples, wherever their tokens lie, and the report on what became of a source's rows."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Generic, NamedTuple, TypeVar, overload

from peftctl.data.order import Mix
from peftctl.data.sources import Fault
from peftctl.row import Row

T = TypeVar("T", covariant=True)


class Lazy(Sequence[T], Generic[T]):
    """A sequence whose items are made when they are asked for; equal to any sequence of equal items."""

    def __init__(self, size: int, get: Callable[[int], T]) -> None:
        self.size = size
        self.get = get

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return tuple(self.get(one) for one in range(self.size)[index])
        return self.get(range(self.size)[index])

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Sequence) and len(other) == self.size
        return same and all(mine == theirs for mine, theirs in zip(self, other, strict=True))  # type: ignore[call-overload]

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(tuple(self))


class Examples(Lazy[tuple[Row, ...]]):
    """`lengths` answers the tokens of each row of an example without reading them, `digest` what `digest` does."""

    def __init__(
        self,
        size: int,
        get: Callable[[int], tuple[Row, ...]],
        lengths: Callable[[int], Sequence[int]],
        digest: Callable[[int], int],
    ) -> None:
        super().__init__(size, get)
        self.lengths = lengths
        self.digest = digest


def digest(rows: Sequence[Row]) -> int:
    """A number of 64 bits that examples of the same tokens have in common."""
    found = hashlib.blake2b(digest_size=8)
    for row in rows:
        found.update(array("I", (*row.ids, 0xFFFFFFFF)).tobytes())
    return int.from_bytes(found.digest(), "little")


def listed(examples: Sequence[tuple[Row, ...]]) -> Examples:
    """Examples that are in memory."""
    if isinstance(examples, Examples):
        return examples
    return Examples(
        len(examples),
        examples.__getitem__,
        lambda index: [len(row.ids) for row in examples[index]],
        lambda index: digest(examples[index]),
    )


class Origin(NamedTuple):
    """One of several sources."""

    file: str
    sha256: str
    examples: int
    each_epoch: int  # examples that an epoch has of it


@dataclass(frozen=True)
class Dataset:
    """Encoded examples: of each its rows (a pair has two), whose `example` is its index here, and its place.

    `origins`: of several sources, each. `mix`: how many examples of each an epoch has, where not every one just once.
    """

    name: str
    examples: Sequence[tuple[Row, ...]]
    places: Sequence[str]
    fingerprint: str  # sha256 of the source
    origins: tuple[Origin, ...] = ()
    mix: Mix | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def rows(self, indices: Sequence[int]) -> list[Row]:
        """The rows of these examples, in order."""
        return list(chain.from_iterable(self.examples[index] for index in indices))

    def sizes(self, padded: bool = False) -> Sequence[int]:
        """Of each example, its rows' tokens; `padded`: as a rectangle, each row as long as the example's longest."""
        lengths = map(listed(self.examples).lengths, range(len(self)))
        return array("L", (len(own) * max(own) if padded else sum(own) for own in lengths))

    def subset(self, indices: Sequence[int]) -> Dataset:
        """These examples alone, numbered anew."""
        chosen, own = array("L", indices), listed(self.examples)
        examples = Examples(
            len(chosen),
            lambda new: numbered(own[chosen[new]], new),
            lambda new: own.lengths(chosen[new]),
            lambda new: own.digest(chosen[new]),
        )
        return Dataset(self.name, examples, Lazy(len(chosen), lambda new: self.places[chosen[new]]), self.fingerprint)


def numbered(rows: tuple[Row, ...], example: int) -> tuple[Row, ...]:
    """The rows of an example, with its index."""
    return tuple(row._replace(example=example) for row in rows)


class Report(NamedTuple):
    """What became of a source's rows. Tokens are counted in all sequences of the kept examples."""

    name: str
    format: str
    kind: str
    read: int
    kept: int
    refused: int
    faults: tuple[Fault, ...]  # the first ten
    sequences: int  # of which an example may have two, and a row that was split has several
    tokens: int
    labelled_tokens: int
    unlabelled: int  # examples refused because no token of theirs would be learnt
    answers: int  # sequences whose labels are tokens
    ended: int  # those whose last label is an end token; far fewer than all: the model will not learn to stop
    median: int  # tokens of a sequence
    p90: int
    longest: int
    reach: int  # positions of the longest: of an encoder-decoder, its longer side; of a prompt, its answer too
    histogram: tuple[int, ...]  # sequences by length, in equal steps up to the longest
    truncated: int  # rows that were longer than data.max_length, and were cut or split
    bos_doubled: int  # sequences that begin with BOS twice
    bos_missing: int  # those that lack it, though the tokenizer begins texts with it
    unused: tuple[str, ...]  # columns that nothing reads
