"""Captioned pictures in any form -> records, one by one, the bad ones named.

Start at `read_source`. It knows CSV and TSV, JSONL, a folder of pictures with .txt files beside
them, and WebDataset shards. A record's picture is a path not yet read, or the bytes of a file:
reading and decoding is the consumer's work, which it can do in parallel.
"""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from clipserve.errors import DataError
from clipserve.shards import ShardSet, is_shard_source, is_utf8

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
IMAGE_COLUMNS = ("image", "image_path", "path", "filepath", "file", "filename", "img")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "description", "name")


@dataclass(frozen=True)
class Record:
    """One picture with its captions."""

    key: str
    """unique in its source"""
    origin: str
    """where it stands, for messages and provenance: "captions.csv row 17" """
    image: Path | bytes
    captions: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    """whatever else the source says of it, JSON-able"""


@dataclass(frozen=True)
class BadRecord:
    """A sample that cannot be used, and why. `kind` is countable, `reason` is for a person."""

    key: str
    origin: str
    kind: str
    reason: str


@dataclass(frozen=True)
class SourceOptions:
    """Which columns of a table to use; None takes the first well-known name that is there."""

    image_column: str | None = None
    caption_column: str | None = None
    id_column: str | None = None
    """its values become the keys; None numbers the rows: `captions/000000017`"""


def read_source(
    path: Path, options: SourceOptions = SourceOptions()
) -> Iterator[Record | BadRecord]:
    """Records of a table, a folder, or shards, in their order there.

    Relative picture paths in a table are relative to the table. Raises DataError when the source as
    a whole is not usable; a bad row is a BadRecord.
    """
    if not path.exists():
        raise DataError(f"source {path} does not exist")
    suffix = path.suffix.lower()
    if is_shard_source(path):
        return _read_shards(path)
    if path.is_dir():
        return _read_folder(path)
    if suffix in (".csv", ".tsv"):
        return _read_table(path, "\t" if suffix == ".tsv" else ",", options)
    if suffix in (".jsonl", ".ndjson"):
        return _read_jsonl(path, options)
    raise DataError(
        f"source {path} is of no known kind; give a .csv, .tsv or .jsonl file,"
        " a folder of pictures with .txt files, or a folder of .tar shards"
    )


def first_lines(bad: list[BadRecord], limit: int = 20) -> Iterator[str]:
    """The bad records for a person, the first `limit` of them."""
    for record in islice(bad, limit):
        yield f"{record.origin}: {record.kind}: {record.reason}"
    if len(bad) > limit:
        yield f"... and {len(bad) - limit} more, not shown"


def _read_table(path: Path, delimiter: str, options: SourceOptions) -> Iterator[Record | BadRecord]:
    # Bytes that are not UTF-8 become surrogates, so that only their own row is bad.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = _rows(path, csv.reader(file, delimiter=delimiter, strict=True))
        columns = next(rows, [])
        image = _choose(path, columns, options.image_column, IMAGE_COLUMNS, "image")
        caption = _choose(path, columns, options.caption_column, CAPTION_COLUMNS, "caption")
        parse = _RowParser(path, image, caption, options.id_column, columns)
        # As a spreadsheet counts: the header is row 1, and blank rows count.
        for number, row in enumerate(rows, start=2):
            origin = f"{path.name} row {number}"
            if len(row) > len(columns):
                reason = f"{len(row)} fields under {len(columns)} columns; quote a text with commas"
                yield BadRecord(f"row {number}", origin, "bad_row", reason)
            elif any(row):
                yield parse.record(number - 2, origin, dict(zip(columns, row, strict=False)))


def _rows(path: Path, reader: Any) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:  # a quote that is never closed would swallow all that follows
        raise DataError(f"{path} line {reader.line_num}: {error}; is a quote missing?") from None


def _read_jsonl(path: Path, options: SourceOptions) -> Iterator[Record | BadRecord]:
    parse = None
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            origin = f"{path.name} line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield BadRecord(f"line {number}", origin, "bad_row", f"not JSON: {error}")
                continue
            if not isinstance(row, dict):
                yield BadRecord(f"line {number}", origin, "bad_row", "not a JSON object")
                continue
            if parse is None:  # the first object says which names are used
                columns = list(row)
                image = _choose(path, columns, options.image_column, IMAGE_COLUMNS, "image")
                caption = _choose(path, columns, options.caption_column, CAPTION_COLUMNS, "caption")
                parse = _RowParser(path, image, caption, options.id_column, columns)
            yield parse.record(number - 1, origin, row)


def _read_folder(path: Path) -> Iterator[Record | BadRecord]:
    """Every picture below `path` that has a .txt of the same name beside it."""
    found = False
    for folder, subfolders, files in os.walk(path):
        subfolders.sort()
        for name in sorted(files):
            image = Path(folder, name)
            if image.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            found = True
            relative = image.relative_to(path)
            key = relative.with_suffix("").as_posix()
            if not is_utf8(key):
                shown = key.encode("utf-8", "backslashreplace").decode()
                yield BadRecord(shown, shown, "bad_key", "its name is not UTF-8")
                continue
            yield _folder_record(key, relative.as_posix(), image)
    if not found:
        raise DataError(f"folder {path} holds no pictures ({', '.join(IMAGE_SUFFIXES)})")


def _folder_record(key: str, origin: str, image: Path) -> Record | BadRecord:
    side_file = image.with_suffix(".txt")
    try:
        text = side_file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return BadRecord(key, origin, "missing_caption", f"no {side_file.name} beside it")
    except UnicodeDecodeError:
        return BadRecord(key, origin, "bad_caption", f"{side_file.name} is not UTF-8")
    except OSError as error:
        return BadRecord(key, origin, "missing_caption", f"{side_file.name}: {error.strerror}")
    captions = clean_captions(text.splitlines())
    if not captions:
        return BadRecord(key, origin, "empty_caption", f"{side_file.name} is empty")
    return Record(key, origin, image, captions)


def _read_shards(path: Path) -> Iterator[Record | BadRecord]:
    shards = ShardSet.open(path)
    for bad in shards.manifest.bad:
        yield BadRecord(bad.key, f"{bad.shard}:{bad.key}", bad.kind, bad.reason)
    for i in range(len(shards)):
        sample = shards.read(i)
        origin = f"{sample.shard}:{sample.key}"
        key = f"{sample.shard.removesuffix('.tar')}/{sample.key}"  # keys may repeat across shards
        captions = clean_captions(sample.captions)
        if not captions:
            yield BadRecord(key, origin, "empty_caption", "the caption is empty")
        else:
            yield Record(key, origin, sample.image, captions, sample.metadata)


class _RowParser:
    """Rows of one table -> records; remembers ids, to refuse a repeated one."""

    def __init__(
        self, path: Path, image: str, caption: str, id_column: str | None, columns: Any
    ) -> None:
        self._path, self._image, self._caption = path, image, caption
        self._id = id_column and _choose(path, columns, id_column, (), "id")
        self._seen: set[str] = set()

    def record(self, number: int, origin: str, row: dict[str, Any]) -> Record | BadRecord:
        key = f"{self._path.stem}/{number:09d}"
        if self._id:
            key = str(row.get(self._id) or "").strip()
            if not key or not is_utf8(key) or key in self._seen:
                what = f"id {key!r} is repeated" if key in self._seen else "the id is empty or bad"
                return BadRecord(f"row {number}", origin, "bad_id", what)
            self._seen.add(key)
        place, words = row.get(self._image), row.get(self._caption)
        if not isinstance(place, str) or not place.strip() or "\0" in place or not is_utf8(place):
            reason = f"column {self._image!r} is empty or no path"
            return BadRecord(key, origin, "missing_image", reason)
        given = words if isinstance(words, list) else [words]
        if any(isinstance(text, str) and not is_utf8(text) for text in given):
            return BadRecord(key, origin, "bad_caption", f"column {self._caption!r} is not UTF-8")
        captions = clean_captions(text for text in given if isinstance(text, str))
        if not captions:
            return BadRecord(key, origin, "empty_caption", f"column {self._caption!r} is empty")
        image = self._path.parent / place.strip()
        return Record(key, origin, image, captions, self._metadata(row))

    def _metadata(self, row: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value
            for name, value in row.items()
            if isinstance(name, str)
            and name != self._caption
            and value not in (None, "")
            and is_utf8(name)
            and not (isinstance(value, str) and not is_utf8(value))
        }


def clean_captions(texts: Any) -> tuple[str, ...]:
    """White space folded, empty ones left out: one caption is one line."""
    return tuple(folded for text in texts if (folded := " ".join(text.split())))


def _choose(path: Path, columns: Any, wanted: str | None, known: tuple[str, ...], what: str) -> str:
    if wanted is not None:
        if wanted not in columns:
            raise DataError(f"{path} has no column {wanted!r}; it has: {', '.join(columns)}")
        return wanted
    by_lower = {str(column).lower().strip(): str(column) for column in reversed(columns)}
    for name in known:
        if name in by_lower:
            return by_lower[name]
    raise DataError(
        f"{path} has no {what} column I know ({', '.join(known)}); it has:"
        f" {', '.join(map(str, columns)) or 'none'}; name it with --{what}-column"
    )
