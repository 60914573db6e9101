"""Captioned pictures in any form -> records, one by one, the bad ones named.

Start at `read_source`. A record's picture is a path not yet read, a URL not yet fetched, or the
bytes of a file: reading and decoding is the consumer's work, which it can do in parallel.

    records.py       Record, BadRecord, SourceOptions
    rows.py          rows of any table -> records; groups, ids, splits
    captions.py      columns or a template -> captions
    numeric.py       texts that stand for numbers -> numbers
    tables.py        CSV, TSV, JSONL
    parquet.py       Parquet files
    annotations.py   COCO, Karpathy, lists in JSON
    folders.py       pictures with side files, a folder for each class
    hub.py           Hugging Face datasets
    tars.py          WebDataset shards, img2dataset
"""

from collections.abc import Iterator
from pathlib import Path

from clipserve.errors import DataError
from clipserve.shards import MANIFEST, is_shard_source, read_manifest
from clipserve.sources import folders, hub, tables, tars
from clipserve.sources.annotations import read_annotations
from clipserve.sources.records import (
    BadRecord,
    Record,
    SourceOptions,
    Url,
    clean_captions,
    first_lines,
)
from clipserve.storage import is_remote, shown

__all__ = [
    "BadRecord",
    "Record",
    "SourceOptions",
    "Url",
    "clean_captions",
    "count_records",
    "first_lines",
    "read_source",
]

_DEFAULT_OPTIONS = SourceOptions()
_JSONL = (".jsonl", ".ndjson")
_TABLES = (".csv", ".tsv", *_JSONL)


def read_source(
    source: str | Path, options: SourceOptions = _DEFAULT_OPTIONS
) -> Iterator[Record | BadRecord]:
    """Records of a table, a folder, a dataset, or shards, in their order there.

    Relative picture paths in a table are relative to the table, or to `options.image_folder`.
    Raises DataError when the source as a whole is not usable; a bad row is a BadRecord.
    """
    if str(source).startswith(hub.PREFIX):
        return hub.read_hub(str(source), options)
    if is_shard_source(source):
        _refuse_table_options(source, options)
        return tars.read_shards(source, options)
    if is_remote(str(source)):
        raise DataError(
            f"source {shown(str(source))} is remote and no shards: only .tar files and"
            " manifest.json are read from elsewhere; download it first"
        )
    path = Path(source)
    if not path.exists():
        raise DataError(f"source {path} does not exist")
    if path.is_dir():
        return _read_directory(path, options)
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return tables.read_csv(path, "\t" if suffix == ".tsv" else ",", options)
    if suffix in _JSONL:
        return tables.read_jsonl(path, options)
    if suffix == ".json":
        return read_annotations(path, options)
    if suffix == ".parquet":
        return _read_parquet([path], options)
    raise DataError(
        f"source {path} is of no known kind; give a .csv, .tsv, .jsonl, .json or .parquet file, a"
        " folder of pictures, a folder of .tar shards, a saved dataset, or hf:NAME"
    )


def count_records(source: str | Path, options: SourceOptions = _DEFAULT_OPTIONS) -> int | None:
    """About how many records a source has, for a progress bar; None where it takes long to tell."""
    if options.split or options.group_by or not _is_local(source):
        return None
    path = Path(source)
    if path.suffix.lower() in _TABLES and path.is_file():
        return tables.count_rows(path)
    if hub.is_saved_dataset(path):
        return hub.count_saved(path)
    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        return manifest.num_samples + len(manifest.bad)
    if is_shard_source(source):
        return None
    parquet_files = [path] if path.suffix.lower() == ".parquet" else _parquet_files(path)
    if parquet_files:
        from clipserve.sources.parquet import count_rows

        return count_rows(parquet_files)
    return None


def _is_local(source: str | Path) -> bool:
    return not str(source).startswith(hub.PREFIX) and not is_remote(str(source))


def _read_directory(path: Path, options: SourceOptions) -> Iterator[Record | BadRecord]:
    if hub.is_saved_dataset(path):
        return hub.read_saved(path, options)
    if files := _parquet_files(path):
        return _read_parquet(files, options)
    _refuse_table_options(path, options)
    return folders.read_folder(path, options)


def _parquet_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.parquet")) if path.is_dir() else []


def _read_parquet(paths: list[Path], options: SourceOptions) -> Iterator[Record | BadRecord]:
    from clipserve.sources.parquet import read_parquet  # pyarrow takes its time to import

    return read_parquet(paths, options)


def _refuse_table_options(source: str | Path, options: SourceOptions) -> None:
    given = {"group_by": options.group_by, "image_column": options.image_column}
    for name, value in given.items():
        if value is not None:
            raise DataError(f"{source} is no table: {name} {value!r} has no meaning there")
