"""WebDataset shards, and so what img2dataset wrote -> records.

Captions are those of the shards, unless the options name a field of the JSON or a template. What
img2dataset could not download stands in its .parquet files: each such row is a bad record. Start at
`read_shards`, or at `ShardRecords` to read some of them alone.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Self

from clipserve.errors import SampleError
from clipserve.shards import Sample, ShardSet
from clipserve.sources.captions import CaptionRule, split_names
from clipserve.sources.records import BadRecord, Record, SourceOptions
from clipserve.sources.rows import is_in_split, refuse_repeated, to_metadata

_LOG_COLUMNS = ("key", "status", "url", "error_message")


def read_shards(location: str | Path, options: SourceOptions) -> Iterator[Record | BadRecord]:
    """Samples in their order, after the bad ones of the manifest. Raises DataError."""
    records = _read_all(location, options)
    return refuse_repeated(records) if options.id_column is not None else records


class ShardRecords:
    """Records of shards by the numbers of their samples; opening it reads none of them.

    A context manager that closes. Raises DataError where there are no shards.
    """

    def __init__(self, location: str | Path, options: SourceOptions) -> None:
        self.shards = ShardSet.open(location)
        self._location, self._options = location, options

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shards.close()

    def bad(self) -> Iterator[BadRecord]:
        """What is known to be bad without a look at the samples."""
        for bad in self.shards.manifest.bad:
            yield BadRecord(bad.key, f"{bad.shard}:{bad.key}", bad.kind, bad.reason)
        yield from _read_download_logs(Path(self._location), self._options)

    def records(self, start: int, stop: int) -> Iterator[Record | BadRecord]:
        """Samples start..stop-1, less those of another split; ids may repeat."""
        for i in range(start, stop):
            record = _read(self.shards, i, self._options)
            if record is not None:
                yield record


def _read_all(location: str | Path, options: SourceOptions) -> Iterator[Record | BadRecord]:
    with ShardRecords(location, options) as source:
        yield from source.bad()
        yield from source.records(0, len(source.shards))


def _read(shards: ShardSet, i: int, options: SourceOptions) -> Record | BadRecord | None:
    """None: of another split."""
    shard, name = shards.key(i)
    origin = f"{shard}:{name}"
    key = f"{shard.removesuffix('.tar')}/{name}"  # keys may repeat across shards
    try:
        sample = shards.read(i)
        if not is_in_split(sample.metadata, options.splits):
            return None
        return _record(key, origin, sample, options)
    except SampleError as error:
        return BadRecord(key, origin, error.kind, str(error))


def _record(key: str, origin: str, sample: Sample, options: SourceOptions) -> Record:
    fields = {**sample.metadata, "caption": list(sample.captions)}
    rule = CaptionRule.for_fields({"caption": fields["caption"]}, options)
    captions = rule.captions(fields)
    if options.id_column is not None:
        key = str(sample.metadata.get(options.id_column) or "").strip()
        if not key:
            raise SampleError(f"its field {options.id_column!r} is empty", "bad_id")
    numbers = split_names(options.number_columns, sample.metadata)
    metadata = to_metadata(sample.metadata, rule.columns, numbers)
    return Record(key, origin, sample.image, captions, metadata)


def _read_download_logs(folder: Path, options: SourceOptions) -> Iterator[BadRecord]:
    """The rows of img2dataset's parquet files that have no picture."""
    if not folder.is_dir() or options.splits:
        return
    from clipserve.sources.parquet import column_names, parquet_rows

    for tar in sorted(folder.glob("*.tar")):
        log = tar.with_suffix(".parquet")
        if not log.is_file():
            continue
        present = [name for name in _LOG_COLUMNS if name in column_names(log)]
        if not {"key", "status"} <= set(present):
            continue
        for row in parquet_rows(log, present):
            if isinstance(row, BadRecord):
                yield row
            elif row.fields["status"] != "success":
                kind = str(row.fields["status"] or "failed_to_download")
                reason = f"img2dataset: {row.fields.get('error_message') or 'no message'}"
                yield BadRecord(str(row.fields["key"]), row.origin, kind, reason)
