"""Parquet files -> records, a few rows at a time; a row group that is damaged is named and passed.

Pictures are paths or URLs in a text column, bytes in a binary one, or Hugging Face's struct of
`bytes` and `path`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipserve.errors import DataError
from clipserve.sources.records import BadRecord, Record, SourceOptions
from clipserve.sources.rows import Row, Table, read_rows

_ROWS_AT_ONCE = 32
_BUFFER_BYTES = 2**20


def read_parquet(paths: list[Path], options: SourceOptions) -> Iterator[Record | BadRecord]:
    """Files of one schema, one after the other. Raises DataError."""
    columns = column_names(paths[0])
    rows = (row for path in paths for row in parquet_rows(path))
    where = str(paths[0] if len(paths) == 1 else paths[0].parent)
    yield from read_rows(Table(where, paths[0].parent, columns, rows), options)


def parquet_rows(path: Path, columns: list[str] | None = None) -> Iterator[Row | BadRecord]:
    """The rows of one file; `columns` limits what is read."""
    number = 0
    with _open(path) as file:
        for group in range(file.num_row_groups):
            end = number + file.metadata.row_group(group).num_rows
            try:
                for fields in _group_rows(file, group, columns):
                    yield Row(f"{path.stem}/{number:09d}", f"{path.name} row {number}", fields)
                    number += 1
            except (pa.ArrowException, OSError) as error:
                origin = f"{path.name} rows {number} to {end - 1}"
                reason = f"row group {group} is damaged: {_first_line(error)}"
                yield BadRecord(f"{path.stem}/{number:09d}", origin, "bad_row_group", reason)
            number = end


def column_names(path: Path) -> list[str]:
    """From the file's footer."""
    with _open(path) as file:
        return list(file.schema_arrow.names)


def count_rows(paths: Iterable[Path]) -> int:
    """From the files' footers."""
    total = 0
    for path in paths:
        with _open(path) as file:
            total += file.metadata.num_rows
    return total


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # not to be read at all; Arrow's own have no number
        raise DataError(f"{path} is not a parquet file: {_first_line(error)}") from None


def _group_rows(
    file: pq.ParquetFile, group: int, columns: list[str] | None
) -> Iterator[dict[str, Any]]:
    for batch in file.iter_batches(_ROWS_AT_ONCE, [group], columns):
        yield from _readable(batch).to_pylist()


def _readable(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Times as text: Python's cannot hold nanoseconds, nor every year."""
    arrays = [
        pc.cast(array, pa.string()) if pa.types.is_temporal(array.type) else array
        for array in batch.columns
    ]
    return pa.RecordBatch.from_arrays(arrays, names=batch.schema.names)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
