"""Samples of WebDataset shards, any of them by its number. Start at `ShardSet.open`.

A sample is returned as it was scanned, or not at all.
"""

import errno
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from zlib import crc32

import numpy as np

from clipserve.errors import DataError, SampleError
from clipserve.shards.grouping import parse_captions
from clipserve.shards.manifest import checksum, map_index, read_index
from clipserve.shards.open_files import OpenFile, Recent, read_spans
from clipserve.shards.opening import Described, describe
from clipserve.shards.places import default_cache
from clipserve.storage import ShardCache, StorageError, is_remote, local_path, shown

_MAX_OPEN_FILES = 64
_MAX_OPEN_COPIES = 16
_MAX_OPEN_INDEXES = 256
_RETRY_AFTER_S = (0.05, 0.2)
# What a later attempt may not meet again; everything else is for the user to put right.
_TRANSIENT = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNRESET,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
}


@dataclass(frozen=True)
class Sample:
    """One sample's bytes, undecoded. `captions` come from .json's "captions" or else from .txt."""

    shard: str
    key: str
    image: bytes
    captions: tuple[str, ...]
    metadata: dict[str, Any]


class ShardSet:
    """Samples 0..len-1 of a set of shards, readable in any order, from any process and thread.

    Open files are kept per instance and read with pread, so forked workers may share them.
    """

    def __init__(self, location: str, described: Described, cache: ShardCache) -> None:
        self.location = shown(location)
        """for messages: without credentials"""
        self.manifest = described.manifest
        counts = [shard.num_samples for shard in self.manifest.shards]
        self.shard_starts = np.cumsum([0, *counts], dtype=np.int64)
        """(num_shards + 1,): the number of each shard's first sample, and of all samples"""
        self._places, self._indexes = described.places, described.indexes
        self._is_scanned, self._cache = described.is_scanned, cache
        self.is_remote = any(map(self._needs_copy, range(len(self._places))))
        """whether `fetch` has something to do: some shard is remote, or gzip'd"""
        self._checked_indexes = set(range(len(counts))) if described.are_checked else set()
        self._forget()

    def _forget(self) -> None:
        limit = _MAX_OPEN_COPIES if self.is_remote else _MAX_OPEN_FILES
        self._files: Recent[OpenFile] = Recent(limit)
        self._open_indexes: Recent[np.ndarray] = Recent(_MAX_OPEN_INDEXES)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_files", "_open_indexes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    @classmethod
    def open(cls, location: str | Path, cache: ShardCache | None = None) -> Self:
        """From a folder of shards, its manifest.json, a .tar, or a pattern (`train-{000..099}.tar`,
        `train-*.tar`), local or remote. Raises DataError.

        With a manifest, the size of each local shard is compared with it, so one that grew or was
        cut since is refused; `clipserve verify` compares every byte. `cache` holds copies of remote
        and of gzip'd shards; by default it is under the user's cache folder.
        """
        cache = cache or default_cache()
        return cls(str(location), describe(str(location), cache), cache)

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    def read(self, i: int) -> Sample:
        """Sample i, as it was scanned.

        SampleError if its bytes changed since or cannot be read now; DataError if its shard is
        missing or denied.
        """
        shard, row = self._row(i)
        name, key = self._places[shard].name, row[0].decode()
        image, text, words = self._read_spans(shard, key, (row[1:3], row[3:5], row[5:7]))
        if checksum(crc32(image), crc32(text), crc32(words)) != row[7]:
            raise SampleError(
                f"sample {name}:{key} of {self.location} changed since it was scanned;"
                " `clipserve verify` names all that did",
                "changed",
            )
        fields = _parse_json(words)
        captions = parse_captions(fields)
        if captions is None:
            captions = [text.decode(errors="replace")]
        fields.pop("captions", None)
        return Sample(name, key, image, tuple(captions), fields)

    def key(self, i: int) -> tuple[str, str]:
        """(shard, key) of sample i, without reading it."""
        shard, row = self._row(i)
        return self._places[shard].name, row[0].decode()

    def text_bytes(self, samples: np.ndarray) -> np.ndarray:
        """How long the longest caption of each of these samples is, from the index alone."""
        shards = np.searchsorted(self.shard_starts, samples, side="right") - 1
        order = np.argsort(shards, kind="stable")
        found, counts = np.unique(shards, return_counts=True)
        lengths = np.empty(len(samples), np.int64)
        stop = 0
        for shard, count in zip(found.tolist(), counts.tolist(), strict=True):
            start, stop = stop, stop + count
            mine = order[start:stop]
            rows = samples[mine] - self.shard_starts[shard]
            lengths[mine] = self._index(shard)["text_bytes"][rows]
        return lengths

    def fetch(self, shard: int) -> None:
        """Make a shard local ahead of need; may be called from any thread."""
        if self._needs_copy(shard):
            self._cache.fetch(*self._content(shard))

    def close(self) -> None:
        self._forget()

    def _needs_copy(self, shard: int) -> bool:
        return bool(self.manifest.shards[shard].compression) or is_remote(
            self._places[shard].location
        )

    def _content(self, shard: int) -> tuple[str, int | None, str | None]:
        """What the cache is asked for."""
        entry, location = self.manifest.shards[shard], self._places[shard].location
        if self._is_scanned or not is_remote(location):
            return location, None, None  # the very copy that was scanned, while it is kept
        return location, entry.num_bytes, entry.sha256

    def _row(self, i: int) -> tuple[int, tuple[Any, ...]]:
        """The shard of sample i, and its row in the index: see `manifest.index_dtype`."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard = int(np.searchsorted(self.shard_starts, i, side="right")) - 1
        row: tuple[Any, ...] = self._index(shard)[i - int(self.shard_starts[shard])].tolist()
        return shard, row

    def _index(self, shard: int) -> np.ndarray:
        index = self._indexes[shard]
        if isinstance(index, np.ndarray):
            return index
        file = index
        return self._open_indexes.get(shard, lambda: self._load_index(shard, file))

    def _load_index(self, shard: int, file: Path) -> np.ndarray:
        entry = self.manifest.shards[shard]
        if shard not in self._checked_indexes:
            read_index(file, entry)
            self._checked_indexes.add(shard)
        return map_index(file, entry)

    def _read_spans(
        self, shard: int, key: str, spans: Sequence[tuple[int, int]]
    ) -> Sequence[bytes]:
        """The bytes at each (offset, size), from one read if they stand together."""
        for wait in (*_RETRY_AFTER_S, None):
            try:
                file = self._file(shard, key)  # held here, it stays open for the read
                return read_spans(file.descriptor, spans)
            except OSError as error:
                name = self._places[shard].name
                if error.errno not in _TRANSIENT:
                    raise DataError(
                        f"shard {name} of {self.location} cannot be read: {error.strerror};"
                        " put it back or allow access, then start again"
                    ) from None
                if wait is None:
                    message = f"sample {name}:{key} of {self.location}: {error.strerror}"
                    raise SampleError(message, "read_error") from None
                self._files.drop(shard)  # a stale handle never recovers
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _file(self, shard: int, key: str) -> "OpenFile":
        return self._files.get(shard, lambda: OpenFile(self._open_shard(shard, key)))

    def _open_shard(self, shard: int, key: str) -> int:
        if not self._needs_copy(shard):
            return os.open(local_path(self._places[shard].location), os.O_RDONLY | os.O_CLOEXEC)
        self._close_removed()  # before, as the copy to come needs room
        try:
            descriptor = self._cache.open(*self._content(shard))
        except StorageError as error:
            raise SampleError(f"sample {key}: {error}", "read_error") from None
        self._close_removed()  # after, as it may have pushed some out
        return descriptor

    def _close_removed(self) -> None:
        """The cache's bound is one of the disk only if nobody keeps what it has removed."""
        self._files.drop_all(lambda file: file.is_removed)


def _parse_json(data: bytes) -> dict[str, Any]:
    """Lenient, as a scan would not have let it pass: an index may be made by anyone."""
    try:
        value = json.loads(data) if data else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
