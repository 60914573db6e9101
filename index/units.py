"""A source of captioned pictures as units: what a bulk run commits at once, known by its content.

    shards      runs of consecutive samples of one shard; the manifest alone tells their digest
    all else    runs of consecutive records; the digest is of what the records say, and of each
                picture its bytes if they are given inline, its path, size and time if it is a file,
                or its address

A unit whose digest stands in the collection needs no second look at its pictures. Its name says
where it comes from, so that what replaces it is known to. Start at `open_units`.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b, sha256
from pathlib import Path

from clipserve.shards import is_shard_source
from clipserve.sources import BadRecord, Record, SourceOptions, Url, count_records, read_source
from clipserve.sources.hub import PREFIX
from clipserve.sources.tars import ShardRecords

UNIT_SAMPLES = 2048
"""of a shard"""
UNIT_RECORDS = 1024
"""of anything else"""

_UNIT_BYTES = 2**28
"""of pictures given inline, past which a unit ends: they are held until it is embedded"""
_FORMAT = 1  # grows when the same unit should be embedded anew
_MARK_LETTERS = 12
_MAX_LABEL = 200


@dataclass(frozen=True)
class SourceUnit:
    """Consecutive records of a source."""

    name: str
    """unique for the source and the settings: `train-00003.tar@8c5d1b0f92aa[2048:4096]`"""
    digest: str
    """changes with the records, their pictures, or the settings"""
    bad: Sequence[BadRecord]
    """those of its bad records that are known before any picture is read"""
    records: Callable[[], Iterator[Record | BadRecord]]
    """all of its records, the bad ones too"""


@dataclass(frozen=True)
class SourceUnits:
    """A source that has been opened."""

    units: Iterator[SourceUnit]
    bad: Iterator[BadRecord]
    """what belongs to no unit: samples that a manifest says are damaged, failed downloads"""
    count: Callable[[], int | None]
    """about how many records the units have; None where it takes long to tell"""


@contextlib.contextmanager
def open_units(
    source: str | Path, options: SourceOptions, settings: object, size: int | None = None
) -> Iterator[SourceUnits]:
    """The units of a source in its order; the same each time, as long as the source is.

    `settings` is anything JSON can hold that decides what is made of a record; `size` the most
    records of a unit (None: UNIT_SAMPLES or UNIT_RECORDS). Raises DataError as `read_source` does.
    """
    records = read_source(source, options)  # refuses what is no source, and reads nothing yet
    decided = [_FORMAT, settings, asdict(options)]
    if not str(source).startswith(PREFIX) and is_shard_source(source):
        with ShardRecords(source, options) as shards:
            units = _shard_units(shards, decided, size or UNIT_SAMPLES)
            count = None if options.splits else len(shards.shards)
            yield SourceUnits(units, shards.bad(), lambda: count)
    else:
        units = _record_units(records, source, decided, size or UNIT_RECORDS)
        yield SourceUnits(units, iter(()), lambda: count_records(source, options))


def _shard_units(source: ShardRecords, settings: object, size: int) -> Iterator[SourceUnit]:
    starts = source.shards.shard_starts
    for number, shard in enumerate(source.shards.manifest.shards):
        content = [settings, shard.name, shard.sha256, shard.num_samples]
        first, end = int(starts[number]), int(starts[number + 1])
        for start in range(first, end, size):
            stop = min(start + size, end)
            span = f"[{start - first}:{stop - first}]"
            name = f"{_shorten(shard.name)}@{_digest(content)[:_MARK_LETTERS]}{span}"
            yield SourceUnit(name, _digest([content, span]), (), _reader(source, start, stop))


def _reader(
    source: ShardRecords, start: int, stop: int
) -> Callable[[], Iterator[Record | BadRecord]]:
    return lambda: source.records(start, stop)


def _record_units(
    records: Iterable[Record | BadRecord], source: str | Path, settings: object, size: int
) -> Iterator[SourceUnit]:
    is_name = str(source).startswith(PREFIX)
    place = str(source) if is_name else str(Path(source).absolute())
    mark = _digest([settings, place])[:_MARK_LETTERS]
    label = _shorten(place if is_name else Path(place).name)
    start = 0
    for run in _runs(records, size):
        digest = _digest([settings, place, start, [_content(record) for record in run]])
        bad = [record for record in run if isinstance(record, BadRecord)]
        yield SourceUnit(f"{label}@{mark}[{start}:{start + len(run)}]", digest, bad, run.__iter__)
        start += len(run)


def _runs(records: Iterable[Record | BadRecord], size: int) -> Iterator[list[Record | BadRecord]]:
    """Lists of `size` records, and of less where their pictures' bytes are many."""
    run: list[Record | BadRecord] = []
    held = 0
    for record in records:
        if len(run) == size or held >= _UNIT_BYTES:
            yield run
            run, held = [], 0
        run.append(record)
        if isinstance(record, Record) and isinstance(record.image, bytes):
            held += len(record.image)
    if run:
        yield run


def _content(record: Record | BadRecord) -> list[object]:
    if isinstance(record, BadRecord):
        return ["bad", *asdict(record).values()]
    picture = _picture(record.image)
    return [record.key, record.origin, picture, record.captions, record.metadata]


def _picture(image: Path | bytes | Url) -> list[object]:
    if isinstance(image, bytes):
        return ["bytes", blake2b(image, digest_size=32).hexdigest()]
    if isinstance(image, Url):
        return ["url", image.address]
    path = os.fsdecode(image.absolute())
    try:
        status = image.stat()
    except (OSError, ValueError):
        return ["missing", path]
    return ["file", path, status.st_size, status.st_mtime_ns]


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()


def _shorten(label: str) -> str:
    return label if len(label) <= _MAX_LABEL else f"{label[: _MAX_LABEL - 3]}..."
