"""The generation of a collection that was promised to be kept, in a file of 32 bytes.

A write-ahead log that is damaged, or left behind when the database was copied, makes SQLite drop
every commit from there on without a word. So each write, once it is committed, is noted here before
the caller is told; a database that is behind what is noted has lost something.

Written in place, which is one sector: a power cut leaves the old record or the new one.
"""

import fcntl
import os
import struct
import zlib
from pathlib import Path

from clipserve.errors import IndexStoreError
from clipserve.files import sync

ACKNOWLEDGED = "acknowledged"

_RECORD = struct.Struct("<4sQ16s")  # magic, generation, identity; then the CRC-32 of these
_MAGIC = b"ClAk"


def read(path: Path, identity: str) -> int:
    """The last generation promised in the collection at `path`; IndexStoreError if none can tell.

    identity: the collection's, 32 hexadecimal digits.
    """
    try:
        with (path / ACKNOWLEDGED).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # not in the middle of a write
            return _parse(file.read(), identity)
    except FileNotFoundError:
        raise IndexStoreError(
            f"the file {ACKNOWLEDGED!r} is missing; was the collection copied without it, and"
            " without its newest writes? Nobody can tell: restore a snapshot, or take the"
            " collection as it is: clipserve index check DIR --accept-loss"
        ) from None
    except OSError as error:
        raise IndexStoreError(f"{path / ACKNOWLEDGED} cannot be read: {error.strerror}") from error


def promised(path: Path) -> int:
    """The generation promised at `path`, of whatever collection; 0 if nothing there tells one."""
    try:
        data = (path / ACKNOWLEDGED).read_bytes()
        return _parse(data, data[12:28].hex())
    except (OSError, IndexStoreError):
        return 0


def advance(path: Path, identity: str, generation: int) -> None:
    """Put on disk that a generation is promised, unless a later one is. Raises OSError as well."""
    with (path / ACKNOWLEDGED).open("r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if generation > _parse(file.read(), identity):
            os.pwrite(file.fileno(), _pack(identity, generation), 0)
            os.fdatasync(file.fileno())


def write(path: Path, identity: str, generation: int) -> None:
    """Whatever is there, or not: for a new collection and for a repair. Raises OSError."""
    with (path / ACKNOWLEDGED).open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(_pack(identity, generation))
        os.fsync(file.fileno())
    sync(path)


def _pack(identity: str, generation: int) -> bytes:
    record = _RECORD.pack(_MAGIC, generation, bytes.fromhex(identity))
    return record + zlib.crc32(record).to_bytes(4, "little")


def _parse(data: bytes, identity: str) -> int:
    record, checksum = data[:-4], int.from_bytes(data[-4:], "little")
    if len(record) != _RECORD.size or zlib.crc32(record) != checksum:
        raise _unknown("is damaged")
    magic, generation, owner = _RECORD.unpack(record)
    if magic != _MAGIC or owner.hex() != identity:
        raise _unknown("belongs to another collection")
    return int(generation)


def _unknown(what: str) -> IndexStoreError:
    return IndexStoreError(
        f"the file {ACKNOWLEDGED!r} {what}; nobody can tell whether writes are missing: restore a"
        " snapshot, or take the collection as it is: clipserve index check DIR"
    )
