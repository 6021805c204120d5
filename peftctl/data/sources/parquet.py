"""Parquet: read some rows at a time, whatever the size of its row groups."""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftctl.data.sources.lines import ZIPPED
from peftctl.data.sources.records import START, Mark, Record
from peftctl.errors import DataError

if TYPE_CHECKING:
    from pyarrow import DataType, RecordBatch, Table
    from pyarrow.parquet import ParquetFile

ROWS, BUFFER = 256, 1 << 20  # read together; bytes of a column's chunk that are held


def rows(path: Path, name: str, start: Mark = START) -> Iterator[Record]:
    """The rows from a mark on, which counts rows."""
    from pyarrow import ArrowException

    with _opened(path, name) as file:
        number = 0
        try:
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if number + size <= start.offset:
                    number += size
                    continue
                for batch in file.iter_batches(ROWS, row_groups=[group]):
                    for row in values(batch):
                        number += 1
                        if number > start.offset:
                            yield Record(number, row, Mark(number, number))
        except (ArrowException, OSError) as error:
            raise DataError(f"{name}: row {number + 1}: damaged: {_first_line(error)}") from None


def count(path: Path, name: str) -> int:
    """How many rows there are. Raises DataError."""
    with _opened(path, name) as file:
        return int(file.metadata.num_rows)


def values(batch: RecordBatch | Table) -> list[Any]:
    """Rows, of what JSON can hold, or what is wrong with one."""
    try:
        found: list[Any] = batch.to_pylist()
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            return [f"invalid UTF-8 at byte {error.start + 1} of a text"]
        return [row for place in range(len(batch)) for row in values(batch.slice(place, 1))]
    if all(map(_plain, batch.schema.types)):
        return found
    written: list[Any] = json.loads(json.dumps(found, default=_written))
    return written


def _plain(kind: DataType) -> bool:
    """Whether values of an Arrow type are as JSON has them."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return _plain(kind.value_type)
    if types.is_struct(kind):
        return all(_plain(kind.field(number).type) for number in range(kind.num_fields))
    checks = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return any(check(kind) for check in (*checks, types.is_null))


def _written(value: Any) -> Any:
    """Dates, numbers and the like as texts; bytes as what no column can be taken for."""
    return {"bytes": len(value)} if isinstance(value, bytes) else str(value)


@contextmanager
def _opened(path: Path, name: str) -> Iterator[ParquetFile]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise DataError(f"{name}: reading parquet needs pyarrow: pip install datasets") from None
    with tempfile.TemporaryFile() as whole:
        try:
            if path.suffix.lower() == ZIPPED:  # its end must be read first, so it is unpacked
                with gzip.open(path) as packed:
                    shutil.copyfileobj(packed, whole)
            file = ParquetFile(whole if path.suffix.lower() == ZIPPED else path, buffer_size=BUFFER, pre_buffer=False)
        except (ArrowException, OSError, EOFError, zlib.error) as error:
            raise DataError(f"{name} is no parquet file, or is cut off: {_first_line(error)}") from None
        with file:
            yield file


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0].rstrip(".")
