"""Rows of any table -> records: which columns hold what, groups of rows, ids, splits.

Start at `read_rows`. A bad row is a BadRecord; a column that is not there is a DataError.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time
from decimal import Decimal
from hashlib import blake2b
from pathlib import Path
from typing import Any

from clipserve.errors import ConfigError, DataError, SampleError
from clipserve.shards import is_utf8
from clipserve.shards.manifest import MAX_TEXT_BYTES
from clipserve.sources.captions import CaptionRule, choose, split_names
from clipserve.sources.numeric import to_number
from clipserve.sources.records import BadRecord, Record, SourceOptions, Url, to_text

IMAGE_COLUMNS = (
    *("image", "image_path", "path", "filepath", "file_path", "file_name", "file"),
    *("filename", "img", "url", "image_url"),
)
_MAX_COLUMNS = 10_000
_MAX_DEPTH = 32
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """One row as it was read; `key` is used where no column holds ids."""

    key: str
    origin: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows that are read as they come, and what must be known before the first."""

    where: str
    """for messages"""
    folder: Path
    """where relative picture paths begin"""
    columns: Sequence[str]
    rows: Iterable[Row | BadRecord]


def read_rows(table: Table, options: SourceOptions) -> Iterator[Record | BadRecord]:
    """Records of a table in its order. Raises DataError for a column that is not there."""
    if len(table.columns) > _MAX_COLUMNS:
        raise DataError(f"{table.where} has {len(table.columns)} columns, at most {_MAX_COLUMNS}")
    parser = _RowParser(table, options)
    records = _parse(table.rows, parser, options.splits)
    if options.group_by is not None:
        records = _join(records, options.group_by)
    return refuse_repeated(records) if options.id_column is not None else records


def refuse_repeated(records: Iterable[Record | BadRecord]) -> Iterator[Record | BadRecord]:
    """A key that came before makes a record bad."""
    seen = _Seen()
    for record in records:
        if isinstance(record, Record) and not seen.add(record.key):
            reason = f"id {record.key!r} is repeated"
            yield BadRecord(record.key, record.origin, "bad_id", reason)
        else:
            yield record


def to_image(value: Any, folder: Path) -> Path | bytes | Url:
    """A cell -> the picture it means. Raises SampleError."""
    if isinstance(value, Mapping):  # as in the parquet files of Hugging Face
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value.strip() or "\0" in value or not is_utf8(value):
        raise SampleError("is empty or no path", "missing_image")
    scheme = _SCHEME.match(value.strip())
    if scheme is None:
        return folder / value.strip()
    if scheme[1].lower() not in ("http", "https"):
        raise SampleError(f"is a {scheme[1]} address; only http and https", "missing_image")
    return Url(value.strip())


def to_metadata(
    fields: Mapping[str, Any], leave_out: Iterable[str] = (), numbers: Collection[str] = ()
) -> dict[str, Any]:
    """What JSON can hold of the fields, empty ones left out. Raises SampleError.

    `numbers` are those whose texts are made numbers.
    """
    left_out = set(leave_out)
    plain = {
        to_text(name): _to_plain(to_number(name, value) if name in numbers else value, _MAX_DEPTH)
        for name, value in fields.items()
        if isinstance(name, str) and name not in left_out
    }
    return {name: value for name, value in plain.items() if value not in (None, "")}


def is_in_split(fields: Mapping[str, Any], splits: tuple[str, ...]) -> bool:
    """Whether the field "split" is one of the wanted; no wish takes all."""
    return not splits or str(fields.get("split", "")).strip() in splits


class _RowParser:
    """One row -> one record."""

    def __init__(self, table: Table, options: SourceOptions) -> None:
        where, columns = table.where, table.columns
        self._folder = options.image_folder or table.folder
        self._image = choose(where, columns, options.image_column, IMAGE_COLUMNS, "image")
        self._rule = CaptionRule.for_table(where, columns, options)
        self._id = options.id_column
        self._numbers = split_names(options.number_columns, columns)
        needed = [options.id_column, options.group_by, *self._numbers, *options.required_columns]
        for name in [*needed, "split" if options.splits else None]:
            if name is not None:
                choose(where, columns, name, (), "")
        if options.group_by in self._rule.columns:
            raise ConfigError(f"rows cannot be grouped by {options.group_by!r}: it is the caption")
        for name in self._numbers:
            if name in self._rule.columns:
                raise ConfigError(f"{name!r} cannot hold numbers: it is the caption")

    def record(self, row: Row) -> Record | BadRecord:
        key = row.key
        try:
            if self._id is not None:
                key = _to_key(row.fields.get(self._id))
            image = self._to_image(row.fields.get(self._image))
            captions = self._rule.captions(row.fields)
            fields = self._without_bytes(row.fields)
            metadata = to_metadata(fields, self._rule.columns, self._numbers)
        except SampleError as error:
            return BadRecord(key, row.origin, error.kind, str(error))
        return Record(key, row.origin, image, captions, metadata)

    def _without_bytes(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The path alone, where the picture is a struct of bytes and path."""
        value = fields.get(self._image)
        return fields | {self._image: value.get("path")} if isinstance(value, Mapping) else fields

    def _to_image(self, value: Any) -> Path | bytes | Url:
        try:
            return to_image(value, self._folder)
        except SampleError as error:
            raise SampleError(f"column {self._image!r} {error}", error.kind) from None


def _parse(
    rows: Iterable[Row | BadRecord], parser: _RowParser, splits: tuple[str, ...]
) -> Iterator[Record | BadRecord]:
    for row in rows:
        if isinstance(row, BadRecord):
            yield row
        elif is_in_split(row.fields, splits):
            yield parser.record(row)


def _join(records: Iterable[Record | BadRecord], column: str) -> Iterator[Record | BadRecord]:
    """Neighbours with one value in `column` become one record; a value that comes again is bad."""
    group: Record | None = None
    done = _Seen()
    for record in records:
        if isinstance(record, BadRecord):
            yield record
            continue
        value = record.metadata.get(column)
        if value is None:
            yield BadRecord(record.key, record.origin, "bad_group", f"column {column!r} is empty")
        elif group is not None and group.metadata[column] == value:
            joined = tuple(dict.fromkeys((*group.captions, *record.captions)))
            if sum(map(len, joined)) > MAX_TEXT_BYTES:
                reason = f"over {MAX_TEXT_BYTES} characters of captions for {value!r}"
                yield BadRecord(record.key, record.origin, "long_text", reason)
            else:
                group = replace(group, captions=joined)
        elif done.add(str(value)):
            if group is not None:
                yield group
            group = record
        else:
            reason = f"{value!r} came before; sort the table by {column!r}"
            yield BadRecord(record.key, record.origin, "bad_group", reason)
    if group is not None:
        yield group


class _Seen:
    """A set of texts as 8-byte digests: a hundred million of them fit into memory.

    The chance that two of ten million texts are taken for one is about 3 in a million.
    """

    def __init__(self) -> None:
        self._digests: set[int] = set()

    def add(self, text: str) -> bool:
        """Whether it is new."""
        digest = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
        before = len(self._digests)
        self._digests.add(digest)
        return len(self._digests) > before


def _to_key(value: Any) -> str:
    key = str(value).strip() if isinstance(value, str | int) else ""
    if not key or "\0" in key or not is_utf8(key):
        raise SampleError("the id is empty or no text", "bad_id")
    return key


def _to_plain(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return to_text(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if depth == 0:
        raise SampleError(f"it is nested deeper than {_MAX_DEPTH} levels", "bad_row")
    if isinstance(value, Mapping):
        return {to_text(str(k)): _to_plain(v, depth - 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(part, depth - 1) for part in value]
    return None  # bytes and other things that JSON has no form for
