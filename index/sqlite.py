"""SQLite as a collection uses it: connections that check every page, transactions, errors."""

import contextlib
import errno
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apsw
import apsw.sqlite_extra

from clipserve.errors import DiskFull, IndexStoreError

EMBED_AGAIN = "restore a snapshot, or embed the source again"

BUSY_S = 30.0
"""waited for another process before an error says so"""
_LOG_BYTES = 2**26  # what is kept of the write-ahead log when a long reader made it grow
_DISK_FULL = "the disk is full; nothing of this write was kept: make room, then repeat"
_REASONS = {
    apsw.SQLITE_FULL: _DISK_FULL,
    apsw.SQLITE_IOERR_SHMSIZE: _DISK_FULL,  # no room for the index of the write-ahead log
    apsw.SQLITE_IOERR: "reading or writing failed; nothing of this write was kept: check the"
    " disk and its free space, then repeat",
    apsw.SQLITE_BUSY: f"another process has been writing for {BUSY_S:g} s; try again",
    apsw.SQLITE_BUSY_SNAPSHOT: "this thread is still reading an older state; finish reading before"
    " writing",
    apsw.SQLITE_READONLY: "it is read-only here; to write, make its directory and files writable",
    apsw.SQLITE_CANTOPEN: "its database cannot be opened; its directory must exist, and must be"
    " writable unless the collection was closed cleanly and is opened read-only",
    apsw.SQLITE_CORRUPT: f"the database is damaged; {EMBED_AGAIN}",
    apsw.SQLITE_NOTADB: f"not a collection, or damaged beyond reading; {EMBED_AGAIN}",
    apsw.SQLITE_IOERR_DATA: "damaged: a page's checksum is wrong; see what is lost with: clipserve"
    f" index check DIR; then {EMBED_AGAIN}",
}


def connect(file: Path, mode: str) -> apsw.Connection:
    """A connection that checks every page it reads. mode: SQLite's, as in a URI."""
    flags = apsw.SQLITE_OPEN_URI | apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
    name = f"{file.absolute().as_uri()}?{mode}"
    connection = apsw.Connection(name, flags=flags, vfs=_checksum_vfs())
    connection.set_busy_timeout(int(BUSY_S * 1000))
    connection.wal_autocheckpoint(0)  # `tidy` does it
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
    return connection


def fetch(connection: apsw.Connection, query: str, parameters: Sequence[Any] = ()) -> list[Any]:
    """All rows, or an error; never the first of them alone."""
    return connection.execute(query, parameters).fetchall()


@contextlib.contextmanager
def transaction(connection: apsw.Connection) -> Iterator[None]:
    """Committed when the block succeeds, rolled back when it fails."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        roll_back(connection)
        raise


@contextlib.contextmanager
def store_errors(what: str) -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except apsw.Error as error:
        said = reason(error)
        kind = DiskFull if said == _DISK_FULL else IndexStoreError
        raise kind(f"{what}: {said}") from error
    except UnicodeEncodeError:
        raise IndexStoreError(f"{what}: an id must be Unicode text") from None


def not_written(what: str, error: OSError) -> IndexStoreError:
    """The error for what the system refused to write."""
    kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else IndexStoreError
    return kind(f"{what}: {error.strerror}")


def damaged(what: str) -> IndexStoreError:
    """The error for content that cannot be, though SQLite read it."""
    return IndexStoreError(f"{what}: {_REASONS[apsw.SQLITE_CORRUPT]}")


def reason(error: apsw.Error) -> object:
    """What to tell of an error: ours for the kinds that are expected, or its own words."""
    code = getattr(error, "extendedresult", 0)
    return _REASONS.get(code) or _REASONS.get(code & 0xFF) or error  # the rest is detail


def roll_back(connection: apsw.Connection) -> None:
    """End the transaction, if there still is one."""
    if connection.in_transaction:  # SQLite itself ends one that met a full disk
        connection.execute("ROLLBACK")


@functools.cache
def _checksum_vfs() -> str:
    """Its name, once it is registered. Other users of apsw keep the VFS that they had."""
    default = apsw.vfs_names()[0]
    try:
        with contextlib.closing(apsw.Connection(":memory:")) as throw_away:
            apsw.sqlite_extra.load(throw_away, "cksumvfs")
    except Exception as error:
        raise IndexStoreError(
            f"apsw {apsw.apsw_version()} comes without SQLite's checksum VFS ({error}); install"
            " apsw 3.50 or newer from its wheel: pip install --only-binary apsw apsw"
        ) from error
    apsw.set_default_vfs(default)
    return "cksmvfs"
