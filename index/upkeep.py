"""A copy of a collection while it is written to, and space given back to the disk."""

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import apsw

from clipserve.errors import IndexStoreError
from clipserve.files import new_directory
from index import acknowledged
from index.database import DATABASE, Database, is_writable
from index.sqlite import connect, fetch, store_errors

_PATIENCE_MS = 1000
_MORE = 1.05  # of the space that compacting is expected to take


@dataclass(frozen=True)
class CompactReport:
    """Bytes of the database and its log."""

    before: int
    after: int


def snapshot(path: Path, out: Path) -> None:
    """A copy of the collection as it is at one moment, without its built indexes.

    Writers go on meanwhile. `out` appears when it is complete and on disk; it is a collection of
    its own from then on. IndexStoreError if it is there already, or a page is damaged.
    """
    there = IndexStoreError(f"{out} is there already; choose a new name for the snapshot")
    if out.exists():
        raise there
    with Database.open(path, read_only=not is_writable(path)) as database:
        try:
            with new_directory(out, replace=False) as folder, store_errors(f"snapshot of {path}"):
                _copy(database.connection(), folder)
        except FileExistsError:  # meanwhile
            raise there from None
        except OSError as error:
            raise IndexStoreError(f"{out} cannot be written: {error.strerror}") from error


def compact(path: Path) -> CompactReport:
    """Give the space of deleted and replaced items back to the disk.

    Readers go on meanwhile; writers wait, half a minute at most, then are told to try again.
    While one reads an older state the log stays large; a later write makes it small.
    IndexStoreError if the disk has no room: for a while it takes twice the size of what is kept.
    """
    with Database.open(path) as database, database.errors():
        connection = database.connection()
        before = _size(path)
        _check_room(path, connection)
        with _temporary_files_in(path, connection):
            connection.execute("VACUUM")
        connection.set_busy_timeout(_PATIENCE_MS)
        database.tidy(apsw.SQLITE_CHECKPOINT_TRUNCATE)
        return CompactReport(before, _size(path))


def _copy(source: apsw.Connection, folder: Path) -> None:
    """All pages at one moment, as a collection that has no later write in common with the other.

    Page by page: VACUUM INTO would write most pages before the first, which is what tells the
    checksum VFS to write checksums (seen with SQLite 3.54: 95 % of the pages had none).
    """
    identity = uuid.uuid4().hex
    with contextlib.closing(connect(folder / DATABASE, "mode=rwc")) as copy:
        with copy.backup("main", source, "main") as backup:
            backup.step()  # to the end
        copy.execute("UPDATE meta SET value = ? WHERE key = 'identity'", (identity,))
        ((generation,),) = fetch(copy, "SELECT value FROM meta WHERE key = 'generation'")
    acknowledged.write(folder, identity, generation)


def _size(path: Path) -> int:
    files = (path / DATABASE, path / f"{DATABASE}-wal")
    return sum(file.stat().st_size for file in files if file.exists())


def _check_room(path: Path, connection: apsw.Connection) -> None:
    numbers = [
        fetch(connection, f"PRAGMA {name}")[0][0]
        for name in ("page_size", "page_count", "freelist_count")
    ]
    page, pages, unused = numbers
    needed = int(2 * _MORE * page * (pages - unused))  # a copy, and the log that brings it back
    free = shutil.disk_usage(path).free
    if free < needed:
        raise IndexStoreError(
            f"{path}: compacting takes up to {needed / 1e6:,.0f} MB for a while, and"
            f" {free / 1e6:,.0f} MB are free; make room, or make a snapshot on another disk"
        )


@contextlib.contextmanager
def _temporary_files_in(path: Path, connection: apsw.Connection) -> Iterator[None]:
    """SQLite's copy on the disk whose room was looked at, not in /var/tmp."""
    name = str(path.absolute()).replace("'", "''")
    connection.execute(f"PRAGMA temp_store_directory = '{name}'")
    try:
        yield
    finally:
        connection.execute("PRAGMA temp_store_directory = ''")
