"""Shards anyone wrote -> what they hold: one pass over each, every sample checked.

Start at `scan`. Shards are read side by side, each front to back once: its sha256, its headers, and
every sample's checks come from the same bytes. Of a shard that grows meanwhile, that is as much as
it had when it was opened.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from clipserve.errors import DataError, ImageError
from clipserve.files import sha256 as file_sha256
from clipserve.shards.grouping import Part, Row, group, read_part
from clipserve.shards.manifest import (
    BadSample,
    Manifest,
    Shard,
    checksum,
    encode_index,
    index_dtype,
)
from clipserve.shards.places import Place, default_cache
from clipserve.shards.tar import Damage, walk
from clipserve.storage import ShardCache, is_remote, local_path, shown

Progress = Callable[[int, int], None]
"""progress(bytes done, bytes in all); called from several threads, one at a time"""

_CHUNK_BYTES = 2**20
_MAX_THREADS = 8
_GZIP_MAGIC = b"\x1f\x8b"


def scan(
    folder: Path,
    names: Iterable[str],
    *,
    decode: bool = False,
    progress: Progress | None = None,
) -> tuple[Manifest, list[np.ndarray]]:
    """What the shards `names` of a folder hold, and an index of each.

    With `decode`, each picture is decoded, too. Damaged shards are no error: the manifest names
    what is bad in them. Raises DataError for one that cannot be read at all.
    """
    places = [Place(name, str(folder / name)) for name in names]
    return scan_places(places, decode=decode, progress=progress)


def scan_places(
    places: Sequence[Place],
    cache: ShardCache | None = None,
    *,
    decode: bool = False,
    progress: Progress | None = None,
) -> tuple[Manifest, list[np.ndarray]]:
    """As `scan`, for shards anywhere; `cache` holds copies of those that are remote or gzip'd."""
    cache = cache or default_cache()
    meter = _Meter(progress, places)
    threads = min(os.cpu_count() or 1, _MAX_THREADS)
    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as decoders:
        pool = decoders if decode else None
        jobs = [readers.submit(_scan_shard, place, cache, pool, meter) for place in places]
        try:
            found = [job.result() for job in jobs]
        finally:
            for job in jobs:
                job.cancel()
    bad = tuple(entry for _, _, bad_here in found for entry in bad_here)
    return Manifest(tuple(shard for shard, _, _ in found), bad), [index for _, index, _ in found]


def _scan_shard(
    place: Place, cache: ShardCache, decoders: ThreadPoolExecutor | None, meter: "_Meter"
) -> tuple[Shard, np.ndarray, list[BadSample]]:
    try:
        descriptor, compression = _open(place, cache)
        try:
            tape = _Tape(descriptor)
            meter.opened(place, tape.size)
            rows, bad = _read_samples(place.name, tape, meter)
            num_bytes, digest = tape.finish()
            if decoders:
                rows, undecodable = _decode(place.name, rows, descriptor, decoders)
                bad += undecodable
        finally:
            os.close(descriptor)
        if compression:
            path = local_path(place.location)
            num_bytes, digest = path.stat().st_size, file_sha256(path)
    except OSError as error:
        raise DataError(f"shard {shown(place.location)}: {error.strerror}") from None
    out_of_order = sum(row.is_out_of_order for row in rows)
    index = _to_index(rows)
    index_digest = hashlib.sha256(encode_index(index)).hexdigest()
    shard = Shard(place.name, num_bytes, digest, len(rows), index_digest, out_of_order, compression)
    return shard, index, bad


def _open(place: Place, cache: ShardCache) -> tuple[int, str]:
    """A descriptor of the shard's plain bytes, and how they are compressed in a local file."""
    if is_remote(place.location):
        return cache.open(place.location), ""
    descriptor = os.open(local_path(place.location), os.O_RDONLY | os.O_CLOEXEC)
    if os.pread(descriptor, len(_GZIP_MAGIC), 0) != _GZIP_MAGIC:
        return descriptor, ""
    os.close(descriptor)
    return cache.open(place.location), "gzip"


class _Tape:
    """A file read once, front to back, and hashed on the way.

    What lies further back than the piece at hand is read from the file again.
    """

    def __init__(self, descriptor: int) -> None:
        self.size = os.fstat(descriptor).st_size
        self._descriptor = descriptor
        self._buffer, self._start = b"", 0
        self._digest = hashlib.sha256()

    @property
    def position(self) -> int:
        """How many bytes were read and hashed."""
        return self._start + len(self._buffer)

    def read(self, offset: int, size: int) -> bytes:
        """As os.pread, but not beyond the size that the file had when it was opened."""
        if offset < self._start:
            return os.pread(self._descriptor, max(min(size, self.size - offset), 0), offset)
        end = min(offset + size, self.size)
        while self.position < end and self._advance(offset):
            pass
        return self._buffer[offset - self._start : max(end, offset) - self._start]

    def finish(self) -> tuple[int, str]:
        """Read to the end; how many bytes there were, and their sha256."""
        while self._advance(self.size):
            pass
        return self.position, self._digest.hexdigest()

    def _advance(self, keep_from: int) -> bool:
        position = self.position
        chunk = os.pread(self._descriptor, min(_CHUNK_BYTES, self.size - position), position)
        self._digest.update(chunk)
        keep_from = min(keep_from, position)
        self._buffer = self._buffer[keep_from - self._start :] + chunk
        self._start = keep_from
        return bool(chunk)


class _Meter:
    """Adds up the bytes read by all threads."""

    def __init__(self, progress: Progress | None, places: Sequence[Place]) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._expected = {place: _local_size(place) for place in places} if progress else {}
        self._done, self._total = 0, sum(self._expected.values())

    def opened(self, place: Place, size: int) -> None:
        """Now its size is known, which that of a remote or gzip'd shard was not."""
        with self._lock:
            self._total += size - self._expected.get(place, 0)

    def add(self, count: int) -> None:
        if self._progress:
            with self._lock:
                self._done += count
                self._progress(self._done, self._total)


def _local_size(place: Place) -> int:
    try:
        return 0 if is_remote(place.location) else local_path(place.location).stat().st_size
    except OSError:
        return 0  # reading it will say why


def _read_samples(name: str, tape: _Tape, meter: _Meter) -> tuple[list[Row], list[BadSample]]:
    parts: list[Part] = []
    damages: list[tuple[int, Damage]] = []
    reported = 0
    for found in walk(tape.read, tape.size):
        if isinstance(found, Damage):
            damages.append((len(parts), found))
        elif (part := read_part(found, tape.read)) is not None:
            parts.append(part)
        if tape.position - reported >= _CHUNK_BYTES:
            meter.add(tape.position - reported)
            reported = tape.position
    meter.add(tape.size - reported)
    return group(name, parts, damages)


def _decode(
    shard: str, rows: list[Row], descriptor: int, pool: ThreadPoolExecutor
) -> tuple[list[Row], list[BadSample]]:
    """The rows whose pictures decode, and the others."""
    from clipserve.images import check_image  # imports torch, which a scan does without

    def check(row: Row) -> str:
        part = row.parts["image"]
        try:
            check_image(os.pread(descriptor, part.size, part.offset))
        except ImageError as error:
            return str(error)
        return ""

    reasons = list(pool.map(check, rows))
    bad = [
        BadSample(shard, row.key, "bad_image", reason)
        for row, reason in zip(rows, reasons, strict=True)
        if reason
    ]
    return [row for row, reason in zip(rows, reasons, strict=True) if not reason], bad


def _to_index(rows: Sequence[Row]) -> np.ndarray:
    keys = [row.key.encode() for row in rows]
    index = np.zeros(len(rows), index_dtype(max(map(len, keys), default=1)))
    index["key"] = keys
    for name, kind in (("image", "image"), ("text", "txt"), ("json", "json")):
        parts = [row.parts.get(kind) for row in rows]
        index[f"{name}_offset"] = [part.offset if part else 0 for part in parts]
        index[f"{name}_size"] = [part.size if part else 0 for part in parts]
    index["crc32"] = [_row_checksum(row) for row in rows]
    index["text_bytes"] = [row.caption_bytes for row in rows]
    index["image_hash"] = [row.parts["image"].content.image_hash for row in rows]
    return index


def _row_checksum(row: Row) -> int:
    image, text, words = (
        row.parts[kind].content.crc if kind in row.parts else 0 for kind in ("image", "txt", "json")
    )
    return checksum(image, text, words)
