"""One SQLite file whose pages carry checksums, and the proof that no acknowledged write is missing.

SQLite's own checksum VFS (sqlite.org/cksumvfs.html, shipped by apsw) keeps eight bytes at the end
of every page and refuses a page that does not match them. It does not look at the write-ahead log:
commits at its end can vanish without a word, which `acknowledged.py` finds out, and pages in it can
be damaged while it is in use, which `log.py` does. Start at `Database.open`.
"""

import contextlib
import fcntl
import logging
import os
import threading
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import apsw

from clipserve.errors import CollectionClosed, IndexStoreError
from clipserve.files import sync
from index import acknowledged
from index.log import is_whole, num_frames
from index.sqlite import (
    BUSY_S,
    EMBED_AGAIN,
    connect,
    damaged,
    fetch,
    not_written,
    reason,
    roll_back,
    store_errors,
    transaction,
)

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
DATABASE = "collection.sqlite3"

_APPLICATION_ID = 0x436C5376  # "ClSv": tells a collection from any other SQLite database
_PAGE_BYTES = 16384  # seven vectors of E = 512 fill one; of SQLite's 4096 bytes half were wasted
_CHECKSUM_BYTES = 8  # at the end of every page; the VFS knows its databases by this number
_LOG_FRAMES = 1000  # pages in the log before they are copied into the database

_LOG_DAMAGED = (
    "the write-ahead log is damaged; end every process that uses the collection, then see what is"
    " lost with: clipserve index check DIR"
)
_META_TABLE = "CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID"


class Database:
    """The database of the collection in a directory. A connection for each thread that uses it.

    Its table `meta` holds what never changes, and the generation, which grows with every write.
    """

    def __init__(self, path: Path, mode: str) -> None:
        """For `open`, and for a check of what `open` refuses; reads and checks the format alone."""
        self.path = path
        self.read_only = mode != "mode=rw"
        self._mode = mode
        self._local = threading.local()
        self._connections: weakref.WeakSet[apsw.Connection] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._is_closed = False
        self._is_trusted = False
        self._tidied_at = 0
        try:
            with store_errors(str(path)):
                self.meta = _read_meta(path, self.connection())
        except BaseException:
            self.close()
            raise
        self.identity = str(self.meta["identity"])

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> Self:
        """IndexStoreError if there is none, it is damaged, or acknowledged writes are missing.

        From a place that cannot be written to it opens read-only alone.
        """
        database = cls.open_unproven(path, read_only=read_only)
        try:
            problem = database.missing() or database.log_problem()
            if problem is not None:
                raise IndexStoreError(f"{path}: {problem}")
        except IndexStoreError:
            database.close()
            raise
        database.trust()
        return database

    @classmethod
    def open_unproven(cls, path: Path, *, read_only: bool = False) -> Self:
        """As `open`, whatever is missing. Its write-ahead log stays as it is until `trust`."""
        if not (path / DATABASE).is_file():
            raise IndexStoreError(
                f"{path} is not a collection: it has no {DATABASE};"
                " make one with: clipserve embed MODEL SOURCE --collection DIR"
            )
        if not read_only:
            return cls(path, "mode=rw")
        # Without a writable directory SQLite cannot make the file that readers and writers share;
        # nobody writes then, and the database may be read as it lies there.
        shared = (path / f"{DATABASE}-shm").exists() or (path / f"{DATABASE}-wal").exists()
        return cls(path, "mode=ro" if shared or is_writable(path) else "mode=ro&immutable=1")

    def missing(self) -> str | None:
        """What is wrong with the acknowledged generation, if anything."""
        try:
            promised = acknowledged.read(self.path, self.identity)
        except IndexStoreError as error:
            return str(error)
        generation = self.generation()  # after the other, which follows it
        if generation >= promised:
            return None
        return (
            f"acknowledged writes are missing: {promised - generation} of {promised}, the"
            f" write-ahead log is damaged or missing; {EMBED_AGAIN}, or go on without them:"
            " clipserve index check DIR --accept-loss"
        )

    def log_problem(self) -> str | None:
        """What is wrong with the write-ahead log while it is in use, if anything."""
        with self.errors():
            whole = is_whole(self.connection(), self._log, BUSY_S)
        return None if whole else _LOG_DAMAGED

    def trust(self) -> None:
        """What is there is all there was: from now on the log may be copied into the database."""
        self._is_trusted = True

    def tidy(self, mode: int = apsw.SQLITE_CHECKPOINT_PASSIVE) -> None:
        """Copy the log into the database, as far as readers let it. IndexStoreError if damaged."""
        try:
            if not is_whole(self.connection(), self._log):
                raise IndexStoreError(f"collection {self.name!r}: {_LOG_DAMAGED}")
            self.connection().wal_checkpoint(mode=mode)
        except (apsw.BusyError, apsw.LockedError):
            pass  # a reader, this thread's own as well, or one who does the same
        except apsw.Error as error:  # everything is safe in the log; a later one tries again
            logger.warning("the log of collection %r stays long: %s", self.name, reason(error))

    def connection(self) -> apsw.Connection:
        """This thread's own."""
        if self._is_closed:
            raise CollectionClosed(f"collection {self.name!r} is closed; open it again")
        connection: apsw.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = connect(self.path / DATABASE, self._mode)
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)  # unless `close` says so
            with self._lock:
                self._connections.add(connection)
            self._local.connection = connection
        if "immutable" in self._mode and self._log.exists():
            raise IndexStoreError(
                f"collection {self.name!r} is read from a read-only place while another process"
                " writes to it; open it again"
            )
        return connection

    @property
    def name(self) -> str:
        return self.path.absolute().name

    @property
    def _log(self) -> Path:
        return self.path / f"{DATABASE}-wal"

    def errors(self) -> contextlib.AbstractContextManager[None]:
        return store_errors(f"collection {self.name!r}")

    def select(self, query: str, parameters: Sequence[Any] = ()) -> list[Any]:
        with self.errors():
            return fetch(self.connection(), query, parameters)

    def generation(self) -> int:
        return int(self.select("SELECT value FROM meta WHERE key = 'generation'")[0][0])

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[int]:
        """What this thread reads inside is the state at one generation, which is yielded.

        Inside another one of this thread it is that one's state.
        """
        with self.errors():
            connection = self.connection()
            is_inner = connection.in_transaction
            if not is_inner:
                connection.execute("BEGIN")
        try:
            yield self.generation()  # the first read is what takes the snapshot
        finally:
            if not is_inner:
                with self.errors():
                    roll_back(connection)

    @contextlib.contextmanager
    def write(self) -> Iterator[tuple[apsw.Connection, int]]:
        """One transaction; yields the generation that it makes. Durable, and promised, at the end.

        Inside another one of this thread it is a part of that, which its errors must end, too.
        IndexStoreError if nothing was kept, or if it was kept but the promise could not be made.
        So the log is looked after before it: whatever goes wrong with that, nothing was kept.
        """
        outer: int | None = getattr(self._local, "writing", None)
        if outer is not None:
            with self.errors():
                yield self.connection(), outer
            return
        with self.errors():
            connection = self.connection()
            if connection.in_transaction:
                raise IndexStoreError(
                    f"collection {self.name!r}: a write inside a snapshot of this thread; leave the"
                    " snapshot first"
                )
            self._tidy_if_long(connection)
            with transaction(connection):
                query = "UPDATE meta SET value = value + 1 WHERE key = 'generation' RETURNING value"
                ((generation,),) = fetch(connection, query)
                self._local.writing = generation
                try:
                    yield connection, generation
                finally:
                    self._local.writing = None
        self._acknowledge(generation)

    def _tidy_if_long(self, connection: apsw.Connection) -> None:
        """IndexStoreError if the log is damaged. If others are at it, a later write does it."""
        try:
            frames, _ = num_frames(connection, wait_s=0)
        except (apsw.BusyError, apsw.LockedError):
            return
        if frames < self._tidied_at:  # it was begun anew
            self._tidied_at = 0
        if frames < self._tidied_at + _LOG_FRAMES:
            return
        self._tidied_at = frames
        self.tidy()

    def _acknowledge(self, generation: int) -> None:
        try:
            acknowledged.advance(self.path, self.identity, generation)
        except (OSError, IndexStoreError) as error:
            reason = getattr(error, "strerror", None) or error
            raise IndexStoreError(
                f"collection {self.name!r}: the write was kept, but cannot be acknowledged"
                f" ({reason}); repeat it: it then replaces itself"
            ) from error

    def close(self) -> None:
        """Close the connections of all threads; none may be using the database any more.

        The last of all processes leaves the database without a log, if that is whole.
        """
        self._is_closed = True
        with self._lock:
            connections = list(self._connections)
        with contextlib.suppress(apsw.Error, OSError):
            if connections and self._is_trusted and is_whole(connections[0], self._log):
                for connection in connections:
                    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
        for connection in connections:
            connection.close(True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def create(path: Path, schema: Sequence[str], meta: Mapping[str, Any]) -> bool:
    """Make the database, all of it or nothing, unless it is there; returns whether it did.

    `meta` is what it will remember, beside an identity and generation 0.
    """
    if _has_tables(path):
        return False
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(f"{path} cannot be made", error) from error
    with directory_lock(path, ".create.lock", wait=True), store_errors(str(path)):
        if _has_tables(path):
            return False
        if promised := acknowledged.promised(path):
            raise IndexStoreError(
                f"{path} has lost its {DATABASE}, to which {promised} writes were acknowledged;"
                f" restore a snapshot, or remove {path} to begin anew"
            )
        identity = uuid.uuid4().hex
        try:
            acknowledged.write(path, identity, 0)
        except OSError as error:
            raise not_written(f"{path} cannot be written to", error) from error
        with contextlib.closing(connect(path / DATABASE, "mode=rwc")) as connection:
            connection.reserve_bytes("main", _CHECKSUM_BYTES)
            connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            connection.execute("PRAGMA journal_mode = WAL")
            rows = {**meta, "identity": identity, "generation": 0}
            with transaction(connection):
                connection.execute(_META_TABLE)
                for statement in schema:
                    connection.execute(statement)
                connection.executemany("INSERT INTO meta VALUES (?, ?)", rows.items())
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
    sync(path)
    sync(path.absolute().parent)
    return True


def is_writable(path: Path) -> bool:
    """Whether this process may write into a collection's directory and its database."""
    return all(
        os.access(place, os.W_OK, effective_ids=os.access in os.supports_effective_ids)
        for place in (path, path / DATABASE)
    )


@contextlib.contextmanager
def directory_lock(path: Path, name: str, *, wait: bool) -> Iterator[None]:
    """One process at a time, by a lock that a killed process gives back.

    IndexStoreError if it is taken and `wait` is false.
    """
    try:
        descriptor = os.open(path / name, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise not_written(f"{path} cannot be written to", error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    except BlockingIOError:
        raise IndexStoreError(f"{path} is being indexed by another process; wait for it") from None
    finally:
        os.close(descriptor)


def _has_tables(path: Path) -> bool:
    file = path / DATABASE
    if not file.is_file() or not file.stat().st_size:
        return False
    with store_errors(str(path)), contextlib.closing(connect(file, "mode=rw")) as connection:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        ((tables,),) = fetch(connection, "SELECT count(*) FROM sqlite_master")
    return bool(tables)


def _read_meta(path: Path, connection: apsw.Connection) -> dict[str, Any]:
    ((application,),) = fetch(connection, "PRAGMA application_id")
    ((found,),) = fetch(connection, "PRAGMA user_version")
    if application != _APPLICATION_ID:
        raise IndexStoreError(f"{path / DATABASE} is not a collection, but another SQLite database")
    if found > FORMAT_VERSION:
        raise IndexStoreError(
            f"{path} has format {found}; this clipserve reads up to {FORMAT_VERSION}: install a"
            " newer clipserve"
        )
    if found < FORMAT_VERSION:
        raise IndexStoreError(
            f"{path} has format {found}: it was made by an earlier clipserve; embed the source"
            " again into a new directory"
        )
    # One bit in the header would have every page taken for one without a checksum.
    ((is_checked,),) = fetch(connection, "PRAGMA checksum_verification")
    if connection.reserve_bytes("main") != _CHECKSUM_BYTES or not int(is_checked):
        raise damaged(f"{path}: its pages are not checked")
    return dict(fetch(connection, "SELECT key, value FROM meta"))
