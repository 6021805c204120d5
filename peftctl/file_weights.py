"""What a model's files hold of each of its parameters, by transformers' own mapping, read in fp32 in parts or whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftctl.errors import FormatError
from peftctl.folding import DTYPES, blocks, rows_of, stored
from peftctl.formats import names
from peftctl.formats.shards import Entry, Shard, shards
from peftctl.joined import made
from peftctl.skeleton import NewRows

Places = Mapping[str, tuple[Shard, Entry]]


class FileWeight:
    """One parameter. `shape`: as it is read; `owner`: the path of the module whose it is."""

    def __init__(self, shape: tuple[int, ...], owner: str) -> None:
        self.shape, self.owner = shape, owner

    def read(self) -> Tensor:
        """All of it."""
        raise NotImplementedError

    def rows(self, wanted: Sequence[int]) -> Tensor:
        """Some rows of it."""
        return self.read()[list(wanted)]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Its rows in blocks, each with the number of its first row."""
        yield 0, self.read()


class Whole(FileWeight):
    """A parameter that is one tensor of a file."""

    def __init__(self, shard: Shard, entry: Entry, owner: str) -> None:
        super().__init__(entry.shape, owner)
        self.shard, self.entry = shard, entry

    def read(self) -> Tensor:
        with self.shard.path.open("rb") as file:
            return stored(file, self.shard, self.entry).float()

    def rows(self, wanted: Sequence[int]) -> Tensor:
        found = torch.empty(len(wanted), *self.shape[1:])
        with self.shard.path.open("rb") as file:
            for place, row in enumerate(wanted):
                found[place] = stored(file, self.shard, rows_of(self.entry, row, row + 1))[0]
        return found

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        with self.shard.path.open("rb") as file:
            for first, part in blocks(self.entry):
                yield first, stored(file, self.shard, part).float()


class Grown(FileWeight):
    """One that has more rows than its file's: each of them the mean of all that the file has."""

    def __init__(self, own: Whole, new: NewRows) -> None:
        super().__init__((new.total, *own.shape[1:]), own.owner)
        self.own, self.new = own, new
        self._mean: Tensor | None = None

    def read(self) -> Tensor:
        whole = self.own.read()
        return torch.cat([whole, whole.mean(0, keepdim=True).expand(self._added, *whole.shape[1:])])

    def rows(self, wanted: Sequence[int]) -> Tensor:
        held = self.new.before
        found = self.own.rows([row if row < held else 0 for row in wanted])
        if any(row >= held for row in wanted):
            found[torch.tensor([row >= held for row in wanted])] = self._middle()
        return found

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        yield from self.own.blocks()
        yield self.new.before, self._middle().expand(self._added, *self.shape[1:])

    @property
    def _added(self) -> int:
        return self.new.total - self.new.before

    def _middle(self) -> Tensor:
        if self._mean is None:
            total = sum(block.sum(0, dtype=torch.float64) for _, block in self.own.blocks())
            self._mean = (total / self.new.before).float()  # type: ignore[union-attr]
        return self._mean


class Source(NamedTuple):
    """A parameter that a rule of the mapping makes. `name`: the mapping's for it."""

    parts: names.Parts
    name: str
    shape: tuple[int, ...]


class Made(FileWeight):
    """One that loading puts together of several tensors, or takes out of one."""

    def __init__(self, source: Source, places: Places, owner: str) -> None:
        super().__init__(source.shape, owner)
        self.source, self.places = source, places

    @torch.no_grad()
    def read(self) -> Tensor:
        found = {}
        for name in self.source.parts.sources:
            shard, entry = self.places[name]
            with shard.path.open("rb") as file:
                found[name] = stored(file, shard, entry)
        return self.source.parts.joined(found)[self.source.name].float()


class Table(NamedTuple):
    """What the files hold of a model. `missing`: parameters that they lack; `misshapen`: that they have otherwise."""

    parameters: dict[nn.Parameter, FileWeight]
    buffers: dict[str, Tensor]
    missing: list[str]
    misshapen: list[str]


def table(model: Any, folder: Path, new: NewRows | None) -> Table:
    """Raises ModelError and FormatError for the files, and where a tied parameter is stored with two values."""
    places: Places = {entry.name: (shard, entry) for shard in shards(folder) for entry in shard.entries}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    sources = _sources(model, places, shapes, new)
    right = {name for name, source in sources.items() if source.shape == shapes[name]}
    found: dict[nn.Parameter, FileWeight] = {}
    every = dict(model.named_parameters(remove_duplicate=False))
    for full in sorted(right & every.keys()):
        if not _same(found.setdefault(every[full], sources[full]), sources[full]):
            raise FormatError(f"{full} is stored with another value than the parameter that it is tied to")
    lacking = [full for full, parameter in every.items() if parameter not in found]
    return Table(
        found,
        {name: sources[name].read() for name in right - every.keys()},
        [full for full in lacking if full not in sources],
        [full for full in lacking if full in sources],
    )


def _sources(model: Any, places: Places, shapes: Mapping[str, Any], new: NewRows | None) -> dict[str, FileWeight]:
    """What the files hold, by the names of the model."""
    found: dict[str, FileWeight] = {}
    for name, place in names.parameters(model, places).items():
        shard, entry = places[name]
        if place.whole and entry.dtype in DTYPES:
            own = Whole(shard, entry, _owner(place.parameter))
            grown = new is not None and (new.total, *own.shape[1:]) == shapes[place.parameter] != own.shape
            found[place.parameter] = Grown(own, new) if new is not None and grown else own
    for parts in names.parts(model, places):
        for name, tensor in made(parts, places).items():
            full = parts.parameter(name)
            if full in shapes:
                found[full] = Made(Source(parts, name, tuple(tensor.shape)), places, _owner(full))
    return found


def _owner(full: str) -> str:
    return full.rpartition(".")[0]


def _same(one: FileWeight, other: FileWeight) -> bool:
    """Whether two places hold the same numbers."""
    pairs = zip(one.blocks(), other.blocks(), strict=True)
    return one is other or all(torch.equal(a, b) for (_, a), (_, b) in pairs)
