"""Samples -> numbered tar files in one folder, each under its name only when it is whole on disk.

The same samples give the same bytes on any machine and at any time.
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from clipserve.files import sync

_BUFFER_BYTES = 2**20


@dataclass(frozen=True)
class Position:
    """How far a writer's finished shards reach."""

    records: int = 0
    """number of the last record that they deal with"""
    shards: int = 0
    samples: int = 0


class ShardWriter:
    """Writes the shards of one folder, from a position on; what lies beyond it is removed."""

    def __init__(
        self, folder: Path, position: Position, samples_per_shard: int, bytes_per_shard: int
    ) -> None:
        self._folder, self.position = folder, position
        self._max_samples, self._max_bytes = samples_per_shard, bytes_per_shard
        self._samples, self._bytes = 0, 0
        self._file: BinaryIO | None = None
        self._tar: Any = None
        folder.mkdir(parents=True, exist_ok=True)
        kept = {f"{number:06d}.tar" for number in range(position.shards)}
        for file in folder.glob("*.tar"):
            if file.name not in kept:
                file.unlink()

    @property
    def is_between_shards(self) -> bool:
        return self._file is None

    def write(self, members: dict[str, bytes]) -> bool:
        """One sample, its members by extension. Returns whether the shard is full."""
        if self._file is None:
            self._open()
        key = f"{self.position.samples + self._samples:09d}"
        self._tar.write({"__key__": key, **members})
        self._samples += 1
        self._bytes += sum(map(len, members.values()))
        return self._samples >= self._max_samples or self._bytes >= self._max_bytes

    def finish_shard(self) -> None:
        """Give the shard its name, if there is one."""
        if self._file is None:
            return
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._folder / f"{self.position.shards:06d}.tar")
        sync(self._folder)
        self._file = None
        self.position = Position(
            self.position.records, self.position.shards + 1, self.position.samples + self._samples
        )
        self._samples, self._bytes = 0, 0

    def move_to(self, record: int) -> None:
        """Note that the finished shards deal with all records up to this one."""
        records = max(record, self.position.records)
        self.position = Position(records, self.position.shards, self.position.samples)

    def abandon(self) -> None:
        """Drop an unfinished shard."""
        if self._file is not None:
            for writer in (self._tar, self._file):
                with contextlib.suppress(OSError):  # a full disk fails to flush, too
                    writer.close()
            self._file = None
            self._temporary.unlink(missing_ok=True)

    def _open(self) -> None:
        from webdataset import TarWriter

        self._file = self._temporary.open("wb", _BUFFER_BYTES)
        self._tar = TarWriter(self._file, mtime=0, user="", group="")

    @property
    def _temporary(self) -> Path:
        return self._folder / f"{self.position.shards:06d}.tar.tmp"
