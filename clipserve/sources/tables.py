"""CSV, TSV and JSONL files -> records, read line by line."""

import csv
import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from clipserve.errors import DataError
from clipserve.sources.records import BadRecord, Record, SourceOptions
from clipserve.sources.rows import Row, Table, read_rows

_MAX_LINE = 2**24
_PEEKED_ROWS = 100
_CHUNK = 2**20


def read_csv(path: Path, delimiter: str, options: SourceOptions) -> Iterator[Record | BadRecord]:
    """Rows under a header, UTF-8. Raises DataError, also for a quote that is never closed."""
    _check_encoding(path)
    # Bytes that are not UTF-8 become surrogates, so that only their own row is bad.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = _parse_csv(path, csv.reader(_lines(path, file), delimiter=delimiter, strict=True))
        columns = next(rows, [])
        table = Table(str(path), path.parent, columns, _csv_rows(path, columns, rows))
        yield from read_rows(table, options)


def read_jsonl(path: Path, options: SourceOptions) -> Iterator[Record | BadRecord]:
    """One JSON object a line; the columns are those of the first hundred objects."""
    _check_encoding(path)
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        yield from read_objects(path, _json_rows(path, file), options)


def read_objects(
    path: Path, rows: Iterator[Row | BadRecord], options: SourceOptions
) -> Iterator[Record | BadRecord]:
    """Rows that do not all have the same fields."""
    first = list(islice(rows, _PEEKED_ROWS))
    found = [row for row in first if isinstance(row, Row)]
    if not found and len(first) == _PEEKED_ROWS:
        raise DataError(f"{path}: none of its first {_PEEKED_ROWS} entries is a JSON object")
    if not found:
        yield from (row for row in first if isinstance(row, BadRecord))
        return
    columns = list(dict.fromkeys(name for row in found for name in row.fields))
    yield from read_rows(Table(str(path), path.parent, columns, chain(first, rows)), options)


def count_rows(path: Path) -> int:
    """How many rows a CSV, TSV or JSONL file holds, from its line ends; quick, not exact."""
    lines, parity, last = 0, 0, b"\n"
    quote = None if path.suffix.lower() in (".jsonl", ".ndjson") else b'"'
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            outside = chunk.split(quote) if quote else [chunk]
            lines += sum(part.count(b"\n") for part in outside[parity :: 2 if quote else 1])
            parity = (parity + len(outside) - 1) % 2
            last = chunk[-1:]
    return max(lines + (last != b"\n") - (quote is not None), 0)


def _check_encoding(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{path} is UTF-16; save it as UTF-8")


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    number = 0
    while line := file.readline(_MAX_LINE):
        number += 1
        if len(line) == _MAX_LINE:
            raise DataError(f"{path} line {number} is longer than {_MAX_LINE} characters")
        yield line


def _parse_csv(path: Path, reader: Any) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:  # a quote that is never closed would swallow all that follows
        raise DataError(f"{path} line {reader.line_num}: {error}; is a quote missing?") from None


def _csv_rows(
    path: Path, columns: list[str], rows: Iterator[list[str]]
) -> Iterator[Row | BadRecord]:
    # As a spreadsheet counts: the header is row 1, and blank rows count.
    for number, row in enumerate(rows, start=2):
        key, origin = f"{path.stem}/{number - 2:09d}", f"{path.name} row {number}"
        if len(row) > len(columns):
            reason = f"{len(row)} fields under {len(columns)} columns; quote a text with commas"
            yield BadRecord(key, origin, "bad_row", reason)
        elif any(row):
            yield Row(key, origin, dict(zip(columns, row, strict=False)))


def _json_rows(path: Path, file: TextIO) -> Iterator[Row | BadRecord]:
    number = 0
    while line := file.readline(_MAX_LINE):
        number += 1
        key, origin = f"{path.stem}/{number - 1:09d}", f"{path.name} line {number}"
        if len(line) == _MAX_LINE:
            while not line.endswith("\n") and (line := file.readline(_MAX_LINE)):
                pass
            yield BadRecord(key, origin, "bad_row", f"longer than {_MAX_LINE} characters")
        elif line.strip():
            yield _json_row(key, origin, line)


def _json_row(key: str, origin: str, line: str) -> Row | BadRecord:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRecord(key, origin, "bad_row", f"not JSON: {error}")
    if not isinstance(fields, dict):
        return BadRecord(key, origin, "bad_row", "not a JSON object")
    return Row(key, origin, fields)
