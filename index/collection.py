"""The durable collection: ids, metadata, vectors, thumbnails; the one owner of writes.

One SQLite database (write-ahead log, synchronous=FULL) in the collection's directory: a write is on
disk when `upsert` or `delete` returns, readers never wait, and SQLite's lock admits one writer at a
time, whatever process it is in. A row never changes: an upsert removes the item's old row and adds
a new one, and row numbers are never used twice, so what others cache by row number stays true.
Start at `Collection.open`.

Legend: N items, E embedding.
"""

import contextlib
import fcntl
import json
import os
import sqlite3
import threading
import uuid
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from clipserve.errors import IndexStoreError
from clipserve.files import sync

FORMAT_VERSION = 1
DATABASE = "collection.sqlite3"
BLOCK_ROWS = 16384
"""vectors that are read or scanned at a time: 32 MiB at E = 512"""

_APPLICATION_ID = 0x436C5376  # "ClSv": tells a collection from any other SQLite database
_PAGE_BYTES = 16384  # seven vectors of E = 512 fill one; of SQLite's 4096 bytes half were wasted
_BUSY_S = 30.0
_MAX_ID_BYTES = 512
_REMEMBERED_WRITES = 4096
_IDS_PER_QUERY = 500
_UNIT_TOLERANCE = 1e-3
_ROUNDING = 1e-5

_SCHEMA = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID",
    """CREATE TABLE items (
        rowid INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
        caption TEXT NOT NULL, source TEXT NOT NULL, metadata TEXT NOT NULL)""",
    "CREATE TABLE vectors (rowid INTEGER PRIMARY KEY, vector BLOB NOT NULL)",
    "CREATE TABLE thumbnails (rowid INTEGER PRIMARY KEY, jpeg BLOB NOT NULL)",
    """CREATE TABLE deletions (
        generation INTEGER, removed INTEGER, PRIMARY KEY (generation, removed)) WITHOUT ROWID""",
)

_REASONS = {
    sqlite3.SQLITE_FULL: "the disk is full; nothing of this write was kept: make room, then repeat",
    sqlite3.SQLITE_IOERR: "reading or writing failed; nothing of this write was kept: check the"
    " disk and its free space, then repeat",
    sqlite3.SQLITE_BUSY: f"another process has been writing for {_BUSY_S:g} s; try again",
    sqlite3.SQLITE_READONLY: "it is read-only here; to write, make its directory and files"
    " writable",
    sqlite3.SQLITE_CANTOPEN: "its database cannot be opened; its directory must exist, and must be"
    " writable unless the collection was closed cleanly and is opened read-only",
    sqlite3.SQLITE_CORRUPT: "the database is damaged; restore a backup, or embed the source again",
    sqlite3.SQLITE_NOTADB: "not a collection, or damaged beyond reading; restore a backup, or embed"
    " the source again",
}


@dataclass(frozen=True)
class Item:
    """What is known of one picture, beside its vector."""

    id: str
    caption: str = ""
    source: str = ""
    """where it came from, for people"""
    metadata: dict[str, Any] = field(default_factory=dict)
    """anything JSON can hold"""


class Collection:
    """Items and their unit vectors, all made by one model. Usable from many threads at once.

    Made by `create`, `open` or `open_or_create`; a context manager that closes.
    """

    def __init__(self, path: Path, mode: str) -> None:
        self.path = path
        self._mode = mode
        self._local = threading.local()
        self._handles: weakref.WeakSet[_Handle] = weakref.WeakSet()
        self._is_closed = False
        try:
            meta = self._read_meta()
        except IndexStoreError:
            self.close()
            raise
        self.fingerprint = str(meta["fingerprint"])
        self.model_name = str(meta["model_name"])
        self.embed_dim = int(meta["embed_dim"])
        self.identity = str(meta["identity"])
        """random, from its creation: tells it from another collection in the same directory"""

    @classmethod
    def create(cls, path: Path, *, fingerprint: str, model_name: str, embed_dim: int) -> Self:
        """A new, empty collection; IndexStoreError if there is one."""
        if not _initialise(path, fingerprint, model_name, embed_dim):
            raise IndexStoreError(f"{path} holds a collection already; open it, or use another")
        return cls.open(path)

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> Self:
        """An existing collection; IndexStoreError if it is none, damaged, or of a newer format.

        From a place that cannot be written to it opens read-only alone.
        """
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
        return cls(path, "mode=ro" if shared or is_writable(path) else "immutable=1")

    @classmethod
    def open_or_create(
        cls, path: Path, *, fingerprint: str, model_name: str, embed_dim: int
    ) -> Self:
        """The collection, made if missing; IndexStoreError if another model's vectors are in it."""
        _initialise(path, fingerprint, model_name, embed_dim)
        collection = cls.open(path)
        try:
            collection.check_model(fingerprint)
        except IndexStoreError:
            collection.close()
            raise
        return collection

    @property
    def name(self) -> str:
        return self.path.absolute().name

    def upsert(
        self,
        items: Sequence[Item],
        vectors: np.ndarray,
        thumbnails: Sequence[bytes | None] | None = None,
    ) -> None:
        """Add items, or replace those whose id is there, all or none; durable when it returns.

        vectors (N, E) are unit vectors. IndexStoreError, naming the item, for one that is not, for
        an id that is empty, too long or given twice, and for metadata that JSON cannot hold.
        """
        rows = [check_item(item) for item in items]
        _check_distinct(items)
        matrix = self._check_vectors(items, vectors)
        if thumbnails is not None and len(thumbnails) != len(items):
            raise IndexStoreError(f"{len(thumbnails)} thumbnails for {len(items)} items")
        if not items:
            return
        with self._write() as (connection, generation):
            removed = _remove(connection, [item.id for item in items], generation)
            first = _next_rowid(connection)
            numbered = ((first + i, *row) for i, row in enumerate(rows))
            connection.executemany("INSERT INTO items VALUES (?, ?, ?, ?, ?)", numbered)
            blobs = ((first + i, vector.tobytes()) for i, vector in enumerate(matrix))
            connection.executemany("INSERT INTO vectors VALUES (?, ?)", blobs)
            jpegs = ((first + i, jpeg) for i, jpeg in enumerate(thumbnails or ()) if jpeg)
            connection.executemany("INSERT INTO thumbnails VALUES (?, ?)", jpegs)
            _grow_count(connection, len(items) - removed)

    def delete(self, ids: Sequence[str]) -> int:
        """Remove items, durably; returns how many of the ids were there."""
        with self._write() as (connection, generation):
            removed = _remove(connection, list(dict.fromkeys(ids)), generation)
            _grow_count(connection, -removed)
        return removed

    def get(self, ids: Sequence[str]) -> dict[str, Item]:
        """The items of those ids that are there."""
        found = self._select_by_id("id, caption, source, metadata", ids)
        return {row[0]: _to_item(*row) for row in found}

    def contains(self, ids: Iterable[str]) -> set[str]:
        """Those of the ids that are there."""
        return {row[0] for row in self._select_by_id("id", list(ids))}

    def scan(self, start_after: str = "", limit: int = 100) -> list[Item]:
        """Items in the order of their ids; the last id of a page is `start_after` of the next."""
        if limit < 1:
            raise IndexStoreError(f"limit {limit} must be at least 1")
        rows = self._select(
            "SELECT id, caption, source, metadata FROM items WHERE id > ? ORDER BY id LIMIT ?",
            (start_after, limit),
        )
        return [_to_item(*row) for row in rows]

    def count(self) -> int:
        """Items in the collection."""
        return self._meta_number("count")

    def generation(self) -> int:
        """Grows with every committed write, whatever process it came from."""
        return self._meta_number("generation")

    def thumbnail(self, id: str) -> bytes | None:
        """A small JPEG of the item's picture, if one was kept."""
        rows = self._select(
            "SELECT jpeg FROM thumbnails JOIN items USING (rowid) WHERE id = ?", (id,)
        )
        return bytes(rows[0][0]) if rows else None

    def check_model(self, fingerprint: str) -> None:
        """IndexStoreError, naming both, if the vectors in here were made by another model."""
        if fingerprint != self.fingerprint:
            raise IndexStoreError(
                f"collection {self.name!r} was made by model {self.model_name!r} with fingerprint"
                f" {self.fingerprint[:12]}, not by the one with {fingerprint[:12]}; use that model,"
                " or make another collection: clipserve embed MODEL SOURCE --collection NEW_DIR"
            )

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[int]:
        """What this thread reads inside is the state at one generation, which is yielded."""
        with self._errors():
            connection = self._connection()
            connection.execute("BEGIN")
        try:
            yield self.generation()  # the first read is what takes the snapshot
        finally:
            with self._errors():
                connection.rollback()

    def rowids(self) -> np.ndarray:
        """Row numbers of all items (N,) int64, ascending."""
        parts = [np.zeros(0, dtype=np.int64)]
        with self._errors():
            cursor = self._connection().execute("SELECT rowid FROM items ORDER BY rowid")
            while rows := cursor.fetchmany(BLOCK_ROWS):
                parts.append(np.fromiter((row[0] for row in rows), np.int64, len(rows)))
        return np.concatenate(parts)

    def vector_blocks(self, after: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Row numbers (n,) above `after`, ascending, and their vectors (n, E); n is bounded."""
        query = "SELECT rowid, vector FROM vectors WHERE rowid > ? ORDER BY rowid"
        with self._errors():
            cursor = self._connection().execute(query, (after,))
            while rows := cursor.fetchmany(BLOCK_ROWS):
                yield self._unpack(rows)

    def vectors_of(self, rowids: np.ndarray) -> np.ndarray:
        """Vectors (n, E) float32 of live rows (n,), in their order."""
        distinct, place = np.unique(rowids, return_inverse=True)
        query = "SELECT rowid, vector FROM vectors WHERE rowid IN (SELECT value FROM json_each(?))"
        found, vectors = self._unpack(self._select(query, (json.dumps(distinct.tolist()),)))
        if len(found) != len(distinct):
            raise IndexStoreError(f"collection {self.name!r}: {_REASONS[sqlite3.SQLITE_CORRUPT]}")
        return vectors[np.argsort(found)[place]]

    def ids_of(self, rowids: np.ndarray) -> dict[int, str]:
        """Row number -> id, of live rows."""
        query = "SELECT rowid, id FROM items WHERE rowid IN (SELECT value FROM json_each(?))"
        return dict(self._select(query, (json.dumps(rowids.tolist()),)))

    def items_of(self, rowids: np.ndarray) -> dict[int, Item]:
        """Row number -> item, of live rows."""
        query = (
            "SELECT rowid, id, caption, source, metadata FROM items"
            " WHERE rowid IN (SELECT value FROM json_each(?))"
        )
        rows = self._select(query, (json.dumps(rowids.tolist()),))
        return {rowid: _to_item(*row) for rowid, *row in rows}

    def deleted_since(self, generation: int) -> np.ndarray | None:
        """Row numbers removed after `generation`; None if that is too long ago to be remembered."""
        if not 0 <= self.generation() - generation <= _REMEMBERED_WRITES:
            return None
        query = "SELECT removed FROM deletions WHERE generation > ?"
        return np.array([row[0] for row in self._select(query, (generation,))], dtype=np.int64)

    def close(self) -> None:
        """Close the connections of all threads; none may be using the collection any more."""
        self._is_closed = True
        for handle in list(self._handles):
            handle.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connection(self) -> sqlite3.Connection:
        """This thread's own."""
        if self._is_closed:
            raise IndexStoreError(f"collection {self.name!r} is closed; open it again")
        handle: _Handle | None = getattr(self._local, "handle", None)
        if handle is None:
            handle = _Handle(_connect(self.path / DATABASE, self._mode))
            self._handles.add(handle)
            self._local.handle = handle
        if self._mode.startswith("immutable") and (self.path / f"{DATABASE}-wal").exists():
            raise IndexStoreError(
                f"collection {self.name!r} is read from a read-only place while another process"
                " writes to it; open it again"
            )
        return handle.connection

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return _store_errors(f"collection {self.name!r}")

    @contextlib.contextmanager
    def _write(self) -> Iterator[tuple[sqlite3.Connection, int]]:
        """One transaction; yields the generation that it makes."""
        with self._errors():
            connection = self._connection()
            with _transaction(connection):
                query = "UPDATE meta SET value = value + 1 WHERE key = 'generation' RETURNING value"
                ((generation,),) = connection.execute(query).fetchall()
                yield connection, generation
                forgotten = generation - _REMEMBERED_WRITES
                connection.execute("DELETE FROM deletions WHERE generation <= ?", (forgotten,))

    def _select(self, query: str, parameters: Sequence[object] = ()) -> list[Any]:
        with self._errors():
            return self._connection().execute(query, parameters).fetchall()

    def _select_by_id(self, columns: str, ids: Sequence[str]) -> list[Any]:
        with self._errors():
            return _select_by_id(self._connection(), columns, ids)

    def _meta_number(self, key: str) -> int:
        return int(self._select("SELECT value FROM meta WHERE key = ?", (key,))[0][0])

    def _read_meta(self) -> dict[str, Any]:
        with _store_errors(str(self.path)):
            connection = self._connection()
            ((application,),) = connection.execute("PRAGMA application_id").fetchall()
            ((found,),) = connection.execute("PRAGMA user_version").fetchall()
            if application != _APPLICATION_ID:
                raise IndexStoreError(
                    f"{self.path / DATABASE} is not a collection, but another SQLite database"
                )
            if found > FORMAT_VERSION:
                raise IndexStoreError(
                    f"{self.path} has format {found}; this clipserve reads up to {FORMAT_VERSION}:"
                    " install a newer clipserve"
                )
            return dict(connection.execute("SELECT key, value FROM meta").fetchall())

    def _unpack(self, rows: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        rowids = np.fromiter((row[0] for row in rows), np.int64, len(rows))
        data = b"".join(row[1] for row in rows)
        if len(data) != len(rows) * self.embed_dim * 4:
            raise IndexStoreError(f"collection {self.name!r}: {_REASONS[sqlite3.SQLITE_CORRUPT]}")
        return rowids, np.frombuffer(data, "<f4").reshape(len(rows), self.embed_dim)

    def _check_vectors(self, items: Sequence[Item], vectors: np.ndarray) -> np.ndarray:
        """As little-endian float32, exactly of unit length as far as float32 goes."""
        matrix = np.ascontiguousarray(vectors, dtype="<f4")
        if matrix.shape != (len(items), self.embed_dim):
            raise IndexStoreError(
                f"vectors of shape {matrix.shape} for {len(items)} items; collection"
                f" {self.name!r} needs ({len(items)}, {self.embed_dim})"
            )
        norms = np.linalg.norm(matrix.astype(np.float64), axis=1)
        bad = np.flatnonzero(~(np.abs(norms - 1) <= _UNIT_TOLERANCE))  # NaN is bad as well
        if len(bad):
            raise IndexStoreError(
                f"vector of item {items[bad[0]].id!r} has length {norms[bad[0]]:.6g}; it must be"
                " finite and of length 1: divide it by its length"
            )
        off = np.abs(norms - 1) > _ROUNDING
        if off.any():
            matrix = np.where(off[:, None], matrix / norms[:, None], matrix).astype("<f4")
        return matrix


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
        raise IndexStoreError(f"{path} cannot be written to: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    except BlockingIOError:
        raise IndexStoreError(f"{path} is being indexed by another process; wait for it") from None
    finally:
        os.close(descriptor)


def check_item(item: Item) -> tuple[str, str, str, str]:
    """The columns of an item; IndexStoreError says what makes it impossible to store."""
    check_id(item.id)
    for value in (item.caption, item.source):
        if not _is_text(value):
            raise IndexStoreError(f"item {item.id!r}: caption and source must be Unicode text")
    if not isinstance(item.metadata, dict):
        raise IndexStoreError(f"item {item.id!r}: metadata must be a JSON object")
    try:
        metadata = json.dumps(item.metadata, allow_nan=False, ensure_ascii=False)
        metadata.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise IndexStoreError(f"item {item.id!r}: metadata is not JSON: {error}") from None
    return item.id, item.caption, item.source, metadata


def check_id(id: str) -> None:
    """IndexStoreError unless it is text of 1 to 512 bytes."""
    if not _is_text(id) or not 1 <= len(id.encode()) <= _MAX_ID_BYTES:
        raise IndexStoreError(
            f"id {id[:40]!r} is not allowed; an id is text of 1 to {_MAX_ID_BYTES} bytes"
        )


class _Handle:
    """A thread's connection, closed when the thread ends."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def __del__(self) -> None:
        self.connection.close()


def _initialise(path: Path, fingerprint: str, model_name: str, embed_dim: int) -> bool:
    """Make the tables, all or none, unless there are some; returns whether it did."""
    if embed_dim < 1:
        raise IndexStoreError(f"embed_dim {embed_dim} must be at least 1")
    if (path / DATABASE).is_file() and (path / DATABASE).stat().st_size and _has_tables(path):
        return False
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IndexStoreError(f"{path} cannot be made: {error.strerror}") from None
    meta = {
        "fingerprint": fingerprint,
        "model_name": model_name,
        "embed_dim": embed_dim,
        "identity": uuid.uuid4().hex,
        "generation": 0,
        "count": 0,
    }
    with directory_lock(path, ".create.lock", wait=True), _store_errors(str(path)):
        if (path / DATABASE).exists() and _has_tables(path):
            return False
        with contextlib.closing(_connect(path / DATABASE, "mode=rwc")) as connection:
            connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            connection.execute("PRAGMA journal_mode = WAL")
            with _transaction(connection):
                for statement in _SCHEMA:
                    connection.execute(statement)
                connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
    sync(path)
    sync(path.absolute().parent)
    return True


def _has_tables(path: Path) -> bool:
    with (
        _store_errors(str(path)),
        contextlib.closing(_connect(path / DATABASE, "mode=rw")) as connection,
    ):
        ((tables,),) = connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
    return bool(tables)


def _connect(file: Path, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{file.absolute().as_uri()}?{mode}",
        uri=True,
        timeout=_BUSY_S,
        isolation_level=None,  # transactions are begun and ended by this file alone
        check_same_thread=False,  # `close` may come from another thread
    )
    connection.execute("PRAGMA synchronous = FULL")
    return connection


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Committed when the block succeeds, rolled back when it fails."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        connection.rollback()
        raise


@contextlib.contextmanager
def _store_errors(what: str) -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest is detail
        raise IndexStoreError(f"{what}: {_REASONS.get(code, error)}") from error
    except UnicodeEncodeError:
        raise IndexStoreError(f"{what}: an id must be Unicode text") from None


def _select_by_id(connection: sqlite3.Connection, columns: str, ids: Sequence[str]) -> list[Any]:
    rows: list[Any] = []
    for start in range(0, len(ids), _IDS_PER_QUERY):
        some = ids[start : start + _IDS_PER_QUERY]
        marks = ", ".join("?" * len(some))
        query = f"SELECT {columns} FROM items WHERE id IN ({marks})"
        rows += connection.execute(query, some).fetchall()
    return rows


def _remove(connection: sqlite3.Connection, ids: list[str], generation: int) -> int:
    """Take the rows of those ids out and remember that; returns how many there were."""
    rows = _select_by_id(connection, "rowid", ids)
    for table in ("items", "vectors", "thumbnails"):
        connection.executemany(f"DELETE FROM {table} WHERE rowid = ?", rows)
    removed = ((generation, rowid) for (rowid,) in rows)
    connection.executemany("INSERT INTO deletions VALUES (?, ?)", removed)
    return len(rows)


def _next_rowid(connection: sqlite3.Connection) -> int:
    """Above every row number that was ever used."""
    rows = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'items'").fetchall()
    return int(rows[0][0]) + 1 if rows else 1


def _grow_count(connection: sqlite3.Connection, by: int) -> None:
    connection.execute("UPDATE meta SET value = value + ? WHERE key = 'count'", (by,))


def _check_distinct(items: Sequence[Item]) -> None:
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise IndexStoreError(f"id {item.id!r} is given twice in one write; keep one of them")
        seen.add(item.id)


def _is_text(value: str) -> bool:
    """A str that UTF-8 can hold: no halves of surrogate pairs."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _to_item(id: str, caption: str, source: str, metadata: str) -> Item:
    return Item(id, caption, source, json.loads(metadata))
