"""Hugging Face datasets -> records: a folder written by save_to_disk, or `hf:NAME[:SPLIT]`.

A dataset of the hub is streamed: nothing but the rows under way is held. `datasets` is an optional
package; without it a clear DataError says what to install.
"""

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from clipserve.errors import DataError
from clipserve.sources.records import BadRecord, Record, SourceOptions
from clipserve.sources.rows import Row, Table, read_rows

PREFIX = "hf:"
_DEFAULT_SPLIT = "train"


def is_saved_dataset(path: Path) -> bool:
    """Whether save_to_disk wrote this folder."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def read_saved(path: Path, options: SourceOptions) -> Iterator[Record | BadRecord]:
    """A dataset on disk, memory-mapped; of several splits the wanted ones, else all."""
    datasets = _import_datasets()
    with _named(str(path), datasets):
        loaded = datasets.load_from_disk(str(path))
    parts = loaded if isinstance(loaded, dict) else {"": loaded}
    wanted = options.splits if isinstance(loaded, dict) else ()
    for split in wanted:
        if split not in parts:
            raise DataError(f"{path} has no split {split!r}; it has: {', '.join(parts)}")
    for split in wanted or parts:
        name = f"{path.name}/{split}" if split else path.name
        yield from _read(name, parts[split], split, path, options, datasets)


def read_hub(source: str, options: SourceOptions) -> Iterator[Record | BadRecord]:
    """`hf:NAME` or `hf:NAME:SPLIT`; the split is "train" when nothing names one."""
    datasets = _import_datasets()
    name, _, split = source.removeprefix(PREFIX).partition(":")
    if not name:
        raise DataError(f"source {source} names no dataset; write hf:NAME or hf:NAME:SPLIT")
    for part in [split] if split else list(options.splits) or [_DEFAULT_SPLIT]:
        with _named(source, datasets):
            streamed = datasets.load_dataset(name, split=part, streaming=True)
        yield from _read(f"{name}/{part}", streamed, part, Path(), options, datasets)


def count_saved(path: Path) -> int:
    """Rows of all splits."""
    datasets = _import_datasets()
    with _named(str(path), datasets):
        loaded = datasets.load_from_disk(str(path))
    return sum(map(len, loaded.values())) if isinstance(loaded, dict) else len(loaded)


def _read(
    name: str, rows: Any, split: str, folder: Path, options: SourceOptions, datasets: Any
) -> Iterator[Record | BadRecord]:
    features = rows.features or {}
    for column, feature in features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    labels = {
        column: feature.names
        for column, feature in features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    found = _rows(name, rows, split, labels, datasets)
    first = next(found, None)
    if first is None:
        return
    columns = list(features or first.fields)
    if split:
        columns = list(dict.fromkeys([*columns, "split"]))
        options = replace(options, split=None)  # it has chosen the rows already
    yield from read_rows(Table(name, folder, columns, chain([first], found)), options)


def _rows(
    name: str, rows: Any, split: str, labels: dict[str, list[str]], datasets: Any
) -> Iterator[Row]:
    with _named(name, datasets):
        for number, fields in enumerate(rows):
            names = {
                column: known[fields[column]]
                for column, known in labels.items()
                if isinstance(fields[column], int) and 0 <= fields[column] < len(known)
            }
            part = {"split": split} if split else {}
            yield Row(f"{name}/{number:09d}", f"{name} row {number}", fields | names | part)


@contextlib.contextmanager
def _named(where: str, datasets: Any) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError, datasets.exceptions.DatasetsError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise DataError(f"dataset {where} cannot be read: {first_line}") from None


def _import_datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise DataError(
            "Hugging Face datasets need the package `datasets`: pip install 'clipserve[hf]'"
        ) from None
