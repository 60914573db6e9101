"""Records -> samples for shards: pictures read or fetched, decoded, put on their side of the split.

Start at `to_samples`.
"""

import contextlib
import errno
import json
import os
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256

from clipserve.errors import ImageError, SampleError
from clipserve.images import ImageLimits, check_image, to_png
from clipserve.shards.manifest import MAX_TEXT_BYTES
from clipserve.sources import BadRecord, Record, SourceOptions, Url
from clipserve.sources.fetch import Fetcher, FetchLimits, read_image

BY_CAPTION, BY_IMAGE = "caption", "image"
FATAL_ERRNO = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT)
"""not the fault of one picture: no memory, too many files, a full disk"""

_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_MAX_THREADS = 16
_MAX_WAITING_BYTES = 256 * 2**20


@dataclass(frozen=True)
class PackOptions:
    """How to pack."""

    source: SourceOptions = SourceOptions()
    samples_per_shard: int = 5000
    bytes_per_shard: int = 500 * 2**20
    val_fraction: float = 0.0
    """this part goes to OUT/val, the rest to OUT/train"""
    split_by: str = BY_CAPTION
    """records that agree in this go the same way: "caption" (the first, in lower case), "image"
    (its bytes), or a column by name"""
    limits: ImageLimits = ImageLimits()
    fetch: FetchLimits = FetchLimits()

    @property
    def folders(self) -> tuple[str, ...]:
        return ("train", "val") if self.val_fraction > 0 else ("",)

    @property
    def split_column(self) -> str | None:
        given = self.split_by if self.val_fraction > 0 else BY_CAPTION
        return None if given in (BY_CAPTION, BY_IMAGE) else given


@dataclass(frozen=True)
class Item:
    """A record on its way."""

    number: int
    digest: bytes
    """over all records up to this one"""
    record: Record | BadRecord


@dataclass(frozen=True)
class Sample:
    """A record whose picture was read and decoded."""

    folder: str
    members: dict[str, bytes]


def to_samples(
    items: Iterator[Item], options: PackOptions
) -> Generator[tuple[Item, Sample | BadRecord], None, None]:
    """Read and decode in threads (decoders release the GIL), in order, a bounded number ahead."""
    threads = min(os.cpu_count() or 1, _MAX_THREADS)
    checker = _Checker(options, threads)
    ahead: deque[tuple[Item, Future[Sample | BadRecord]]] = deque()
    with contextlib.ExitStack() as stack:
        stack.enter_context(checker)
        local = stack.enter_context(_pool(threads))
        remote = stack.enter_context(_pool(options.fetch.threads))
        for item in items:
            is_remote = isinstance(item.record, Record) and isinstance(item.record.image, Url)
            limit = 4 * (options.fetch.threads if is_remote else threads)
            while len(ahead) >= limit or (ahead and checker.is_full):
                yield _next_of(ahead, checker)
            pool = remote if is_remote else local
            ahead.append((item, pool.submit(checker.check, item.record)))
        while ahead:
            yield _next_of(ahead, checker)


def _next_of(
    ahead: deque[tuple[Item, Future[Sample | BadRecord]]], checker: "_Checker"
) -> tuple[Item, Sample | BadRecord]:
    item, future = ahead.popleft()
    result = future.result()
    checker.release(result)
    return item, result


@contextlib.contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(threads, "pack")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class _Checker:
    """Reads, decodes and encodes records; knows how many bytes of results wait to be taken."""

    def __init__(self, options: PackOptions, threads: int) -> None:
        self._options = options
        self._fetcher = Fetcher(options.limits.max_bytes, options.fetch)
        self._decoding = threading.Semaphore(threads)  # many fetch at once, few may decode
        self._lock = threading.Lock()
        self._waiting_bytes = 0

    def __enter__(self) -> "_Checker":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._fetcher.close()

    @property
    def is_full(self) -> bool:
        return self._waiting_bytes > _MAX_WAITING_BYTES

    def release(self, result: Sample | BadRecord) -> None:
        self._count(-_num_bytes(result))

    def check(self, record: Record | BadRecord) -> Sample | BadRecord:
        if isinstance(record, BadRecord):
            return record
        try:
            data = read_image(record, self._options.limits, self._fetcher)
            with self._decoding:
                result: Sample | BadRecord = _to_sample(record, data, self._options)
        except SampleError as error:
            result = BadRecord(record.key, record.origin, error.kind, str(error))
        except ImageError as error:
            result = BadRecord(record.key, record.origin, "bad_image", str(error))
        except OSError as error:
            if error.errno in FATAL_ERRNO:
                raise
            reason = f"{error.filename}: {error.strerror}"
            result = BadRecord(record.key, record.origin, "missing_image", reason)
        self._count(_num_bytes(result))
        return result

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self._waiting_bytes += num_bytes


def _num_bytes(result: Sample | BadRecord) -> int:
    return sum(map(len, result.members.values())) if isinstance(result, Sample) else 0


def _to_sample(record: Record, data: bytes, options: PackOptions) -> Sample:
    """Raises ImageError and SampleError."""
    folder = folder_of(record, data, options)
    format = check_image(data, options.limits)
    if format not in _EXTENSIONS:
        data, format = to_png(data, options.limits), "PNG"
    fields = dict(record.metadata)
    if len(record.captions) > 1:
        fields["captions"] = list(record.captions)
    text = record.captions[0].encode()
    rest = json.dumps(fields | {"origin": record.origin}).encode()
    if max(len(text), len(rest)) > MAX_TEXT_BYTES:
        raise SampleError(f"captions or metadata over {MAX_TEXT_BYTES} bytes", "long_text")
    return Sample(folder, {_EXTENSIONS[format]: data, "txt": text, "json": rest})


def folder_of(record: Record, data: bytes, options: PackOptions) -> str:
    """By a hash, so that the same value always goes the same way. Raises SampleError."""
    if options.val_fraction <= 0:
        return ""
    column = options.split_column
    if column is not None:
        if column not in record.metadata:
            raise SampleError(f"column {column!r}, which decides its split, is empty", "no_split")
        value = json.dumps(record.metadata[column], sort_keys=True).encode()
    else:
        value = data if options.split_by == BY_IMAGE else record.captions[0].lower().encode()
    digest = sha256(value).digest()
    return "val" if int.from_bytes(digest[:8], "big") < options.val_fraction * 2**64 else "train"
