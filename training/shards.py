"""Records -> WebDataset shards and a manifest. Start at `pack`.

Every picture is decoded once, so that what is packed will decode in training; a bad one is listed
with its place and reason and left out. The folder appears when it is whole.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from clipserve.errors import DataError, ImageError
from clipserve.files import new_directory, write_atomic
from clipserve.images import ImageLimits, check_image, read_limited, to_png
from clipserve.shards import scan, write_manifest
from clipserve.sources import BadRecord, Record, SourceOptions, read_source

BAD_FILE = "bad_samples.jsonl"
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class PackOptions:
    """How to pack."""

    source: SourceOptions = SourceOptions()
    samples_per_shard: int = 5000
    bytes_per_shard: int = 500 * 2**20
    val_fraction: float = 0.0
    """this part goes to OUT/val, the rest to OUT/train; by a hash of the caption, so that equal
    captions stay together"""
    limits: ImageLimits = ImageLimits()


@dataclass(frozen=True)
class PackReport:
    """What became of the source."""

    packed: dict[str, int]
    """samples written, by folder relative to OUT ("" without a split)"""
    bad: list[BadRecord]

    @property
    def num_good(self) -> int:
        return sum(self.packed.values())

    @property
    def bad_fraction(self) -> float:
        total = self.num_good + len(self.bad)
        return len(self.bad) / total if total else 0.0

    @property
    def bad_by_kind(self) -> dict[str, int]:
        return dict(Counter(bad.kind for bad in self.bad))


def pack(
    source: Path,
    out: Path,
    options: PackOptions = PackOptions(),
    progress: Callable[[int], None] | None = None,
) -> PackReport:
    """Write `source` as shards into `out`, which must be new or empty. Raises DataError.

    `progress` is called with the number of records read so far. The bad ones are also written to
    OUT/bad_samples.jsonl.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is not an empty folder; pack into a new one, or remove it first")
    records = read_source(source, options.source)
    with new_directory(out) as folder:
        return _pack_into(folder, source, records, options, progress)


def _pack_into(
    out: Path,
    source: Path,
    records: Iterator[Record | BadRecord],
    options: PackOptions,
    progress: Callable[[int], None] | None,
) -> PackReport:
    folders = ["train", "val"] if options.val_fraction > 0 else [""]
    bad: list[BadRecord] = []
    with contextlib.ExitStack() as stack:
        writers = {f: stack.enter_context(_ShardWriter(out / f, options)) for f in folders}
        for number, checked in enumerate(_check_all(records, options.limits), start=1):
            if isinstance(checked, BadRecord):
                bad.append(checked)
            else:
                writers[_folder_of(checked.record, options.val_fraction)].write(checked)
            if progress:
                progress(number)
    report = PackReport({folder: writer.num_samples for folder, writer in writers.items()}, bad)
    if not report.num_good:
        first = f"; the first: {bad[0].origin}: {bad[0].reason}" if bad else ""
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.bad_by_kind.items())
        raise DataError(f"{source} has no usable sample: {kinds or 'it is empty'}{first}")
    write_atomic(out / BAD_FILE, "".join(json.dumps(asdict(b)) + "\n" for b in bad))
    for folder in folders:
        names = sorted(file.name for file in (out / folder).glob("*.tar"))
        write_manifest(out / folder, *scan(out / folder, names))
    return report


@dataclass(frozen=True)
class _Checked:
    record: Record
    image: bytes
    extension: str


def _check_all(
    records: Iterator[Record | BadRecord], limits: ImageLimits
) -> Iterator[_Checked | BadRecord]:
    """`_check` on a few threads (decoders release the GIL), in order, a bounded number ahead."""
    threads = min(os.cpu_count() or 1, 8)
    with ThreadPoolExecutor(threads) as pool:
        ahead: list[Future[_Checked | BadRecord]] = []
        for record in records:
            ahead.append(pool.submit(_check, record, limits))
            if len(ahead) > threads + 2:
                yield ahead.pop(0).result()
        for future in ahead:
            yield future.result()


def _check(record: Record | BadRecord, limits: ImageLimits) -> _Checked | BadRecord:
    if isinstance(record, BadRecord):
        return record
    data = record.image
    try:
        if isinstance(data, Path):
            data = read_limited(data, limits.max_bytes)
        format = check_image(data, limits)
        if format not in _EXTENSIONS:
            data, format = to_png(data, limits), "PNG"
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
        return BadRecord(record.key, record.origin, "missing_image", reason)
    except ImageError as error:
        return BadRecord(record.key, record.origin, "bad_image", str(error))
    return _Checked(record, data, _EXTENSIONS[format])


def _folder_of(record: Record, val_fraction: float) -> str:
    if val_fraction <= 0:
        return ""
    digest = sha256(record.captions[0].lower().encode()).digest()
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"


class _ShardWriter:
    """Numbered shards in one folder."""

    def __init__(self, folder: Path, options: PackOptions) -> None:
        self._folder, self._options = folder, options
        self._next_shard, self.num_samples = 0, 0
        self._in_shard, self._bytes = 0, 0
        self._tar: Any = None

    def __enter__(self) -> "_ShardWriter":
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._finish_shard()

    def write(self, checked: _Checked) -> None:
        from webdataset import TarWriter

        full = self._in_shard >= self._options.samples_per_shard
        if full or self._bytes >= self._options.bytes_per_shard:
            self._finish_shard()
        if self._tar is None:
            path = self._folder / f"{self._next_shard:06d}.tar"
            self._tar = TarWriter(str(path), mtime=0, user="", group="")
        record = checked.record
        fields = dict(record.metadata)
        if len(record.captions) > 1:
            fields["captions"] = list(record.captions)
        self._tar.write(
            {
                "__key__": f"{self.num_samples:09d}",
                checked.extension: checked.image,
                "txt": record.captions[0],
                "json": json.dumps(fields | {"origin": record.origin}).encode(),
            }
        )
        self.num_samples += 1
        self._in_shard += 1
        self._bytes += len(checked.image)

    def _finish_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        self._next_shard += 1
        self._in_shard, self._bytes = 0, 0
