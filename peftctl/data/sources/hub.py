"""A data set of a hub, by its name and split: fetched once by `datasets`, and read from where that keeps it.

Nothing that it brings is run: a data set that needs a script of its own is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from peftctl.data.sources.parquet import values
from peftctl.data.sources.records import START, Mark, Record
from peftctl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

ROWS = 256  # read together
COMMIT = re.compile("[0-9a-f]{40}")

T = TypeVar("T")


class Hub:
    """One split as a part of a source."""

    def __init__(self, name: str, split: str, config: str | None = None, revision: str | None = None) -> None:
        self.name = name
        self.split = split
        self.config = config
        self.revision = revision

    @property
    def stem(self) -> str:
        return f"{self.name}:{self.split}:row "

    def records(self, start: Mark = START) -> Iterator[Record]:
        number = start.offset
        table = self._rows.with_format("arrow")
        for first in range(number, len(table), ROWS):
            for row in values(table[first : first + ROWS]):
                number += 1
                yield Record(number, row, Mark(number, number))

    def bytes(self) -> int:
        return int(self._rows.data.nbytes)

    def total(self) -> int | None:
        return len(self._rows)

    def digest(self) -> str:
        """Of its name and the commit, which together tell the content; so nothing has to be read for it."""
        self._rows  # noqa: B018  (a split that is not there is told)
        builder = self._builder
        known = [self.name, builder.config.name, self.split, builder.hash]  # the last is the commit
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    sample = digest

    @property
    def shown(self) -> str:
        return f"{self.name}:{self.split}"

    def _asked(self, work: Callable[[], T]) -> T:
        """What the library answers, its refusals as one line. Raises DataError."""
        from datasets.exceptions import DatasetNotFoundError

        try:
            return work()
        except DatasetNotFoundError as error:
            if "gated" in str(error):
                raise self._fault("is gated: accept its terms on the hub, then set HF_TOKEN") from None
            wanted = f" with revision {self.revision!r}" if self.revision else ""
            raise self._fault(f"is not on the hub{wanted}: check the name; a private one needs HF_TOKEN") from None
        except ConnectionError:
            raise self._fault(
                "is not on this machine and the hub cannot be reached: connect, or name a file as path"
            ) from None
        except RuntimeError as error:
            if "script" in str(error):
                raise self._fault(
                    "comes with a script of its own, which is never run; name its files as path"
                ) from None
            raise
        except Exception as error:  # a library that reads strangers' files: it can fail in any way
            told = error.__cause__ or error
            raise self._fault(
                f"cannot be read: {str(told).splitlines()[0] if str(told) else type(told).__name__}"
            ) from None

    def _fault(self, what: str) -> DataError:
        return DataError(f"data set {self.name} {what}")

    @cached_property
    def _builder(self) -> DatasetBuilder:
        import datasets

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        found = self._asked(lambda: datasets.load_dataset_builder(self.name, self.config, revision=self.revision))
        if self.revision and COMMIT.fullmatch(self.revision) and found.hash != self.revision:
            # without a connection, the library takes whatever it has
            raise self._fault(f"is on this machine as of {found.hash} only, not of {self.revision}: connect") from None
        return found

    @cached_property
    def _rows(self) -> Dataset:
        builder = self._builder

        def prepared() -> Any:
            builder.download_and_prepare()
            return builder.as_dataset(self.split)

        return self._asked(prepared)
