"""The durable collection: ids, metadata, vectors, thumbnails; the one owner of writes.

One SQLite database (`database.py`) in the collection's directory: a write is on disk when `upsert`
or `delete` returns, readers never wait, and SQLite's lock admits one writer at a time, whatever
process it is in. A row never changes: an upsert removes the item's old row and adds a new one, and
row numbers are never used twice, so what others cache by row number stays true. An item has a
vector in at least one of FIELDS, all of one model. Start at `Collection.open`.

Legend: N items, E embedding.
"""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import apsw
import numpy as np

from clipserve.errors import IndexStoreError
from index.database import DATABASE, Database, create, directory_lock, is_writable
from index.items import Item, Unit, check_distinct, check_item, check_vectors, stored_item
from index.sqlite import damaged, fetch

__all__ = [
    "BLOCK_ROWS",
    "DATABASE",
    "FIELDS",
    "Collection",
    "Item",
    "Unit",
    "check_item",
    "directory_lock",
    "is_writable",
]

FIELDS = ("image", "text")
DTYPES = ("float32", "float16")
BLOCK_ROWS = 16384
"""vectors that are read or scanned at a time: 32 MiB at E = 512"""
REMEMBERED_WRITES = 4096
"""for which `deleted_since` knows what they removed"""

_IDS_PER_QUERY = 500

_SCHEMA = (
    """CREATE TABLE items (
        rowid INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, caption TEXT NOT NULL,
        source TEXT NOT NULL, metadata TEXT NOT NULL, fields INTEGER NOT NULL)""",
    "CREATE UNIQUE INDEX items_id ON items (id)",
    "CREATE INDEX items_fields ON items (fields)",  # row numbers without reading the rows
    "CREATE TABLE vectors_image (rowid INTEGER PRIMARY KEY, vector BLOB NOT NULL)",
    "CREATE TABLE vectors_text (rowid INTEGER PRIMARY KEY, vector BLOB NOT NULL)",
    "CREATE TABLE thumbnails (rowid INTEGER PRIMARY KEY, jpeg BLOB NOT NULL)",
    """CREATE TABLE deletions (
        generation INTEGER, removed INTEGER, PRIMARY KEY (generation, removed)) WITHOUT ROWID""",
    """CREATE TABLE units (
        unit TEXT PRIMARY KEY, digest TEXT NOT NULL, count INTEGER NOT NULL,
        bad INTEGER NOT NULL) WITHOUT ROWID""",
)


class Collection:
    """Items and their unit vectors, all made by one model. Usable from many threads at once.

    Made by `create`, `open` or `open_or_create`; a context manager that closes.
    """

    def __init__(self, database: Database) -> None:
        meta = database.meta
        self._database = database
        self.path = database.path
        self.name = database.name
        self.fingerprint = str(meta["fingerprint"])
        self.model_name = str(meta["model_name"])
        self.embed_dim = int(meta["embed_dim"])
        self.dtype = np.dtype(str(meta["dtype"])).newbyteorder("<")
        """of the stored vectors"""
        self.identity = database.identity
        """random, from its creation: tells it from another collection in the same directory"""

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        fingerprint: str,
        model_name: str,
        embed_dim: int,
        dtype: str = "float32",
    ) -> Self:
        """A new, empty collection; IndexStoreError if there is one."""
        if not _create(path, fingerprint, model_name, embed_dim, dtype):
            raise IndexStoreError(f"{path} holds a collection already; open it, or use another")
        return cls.open(path)

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> Self:
        """An existing collection; IndexStoreError if it is none, damaged, or of another format.

        Also if writes are missing that were acknowledged. From a place that cannot be written to
        it opens read-only alone.
        """
        return cls(Database.open(path, read_only=read_only))

    @classmethod
    def open_or_create(
        cls,
        path: Path,
        *,
        fingerprint: str,
        model_name: str,
        embed_dim: int,
        dtype: str | None = None,
    ) -> Self:
        """The collection, made if missing; IndexStoreError if another model's vectors are in it.

        Also if they are stored in another dtype; None takes what is there, float32 if it is made.
        """
        _create(path, fingerprint, model_name, embed_dim, dtype or "float32")
        collection = cls.open(path)
        try:
            collection.check_model(fingerprint)
            if dtype not in (None, collection.dtype.name):
                raise IndexStoreError(
                    f"collection {collection.name!r} stores vectors in {collection.dtype.name}, not"
                    f" in {dtype}; leave that as it is, or make another collection"
                )
        except IndexStoreError:
            collection.close()
            raise
        return collection

    def upsert(
        self,
        items: Sequence[Item],
        vectors: np.ndarray | None,
        thumbnails: Sequence[bytes | None] | None = None,
        *,
        text_vectors: np.ndarray | None = None,
        keep: bool = False,
        unit: Unit | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Add items, or replace those whose id is there, all or none; durable when it returns.

        vectors (N, E), of pictures, and text_vectors (N, E) are unit vectors; one of the two may be
        missing. keep: a vector or thumbnail that an item has and this does not bring stays with it.
        `unit` is noted in the same transaction. fingerprint: of the model that made the vectors;
        IndexStoreError, naming both, if the collection is another's. Vectors of the same dimension
        tell no model, so only None leaves that unchecked. IndexStoreError, naming the item, for a
        vector that is not of unit length, an id that is empty, too long, given twice, "." or "..",
        and metadata that JSON cannot hold; ItemTooLarge; DiskFull.
        """
        if fingerprint is not None:
            self.check_model(fingerprint)
        rows = [check_item(item) for item in items]
        check_distinct(items)
        given = {"image": vectors, "text": text_vectors}
        matrices = {
            field: check_vectors(items, some, self.embed_dim, self.dtype, field)
            for field, some in given.items()
            if some is not None
        }
        if items and not matrices:
            raise IndexStoreError(f"{len(items)} items without vectors; give one of the two kinds")
        if thumbnails is not None and len(thumbnails) != len(items):
            raise IndexStoreError(f"{len(thumbnails)} thumbnails for {len(items)} items")
        if not items and unit is None:
            return
        ids = [item.id for item in items]
        brought = [*matrices, *(() if thumbnails is None else ("thumbnail",))]
        with self._write() as (connection, generation):
            first = _next_rowid(connection)
            bits = _carry_over(connection, ids, first, brought) if keep else [0] * len(ids)
            removed = _remove(connection, ids, generation)
            own = sum(_bit(field) for field in matrices)
            numbered = (
                (first + i, *row, own | kept)
                for i, (row, kept) in enumerate(zip(rows, bits, strict=True))
            )
            connection.executemany("INSERT INTO items VALUES (?, ?, ?, ?, ?, ?)", numbered)
            for field, matrix in matrices.items():
                blobs = ((first + i, vector.tobytes()) for i, vector in enumerate(matrix))
                connection.executemany(f"INSERT INTO vectors_{field} VALUES (?, ?)", blobs)
            jpegs = ((first + i, jpeg) for i, jpeg in enumerate(thumbnails or ()) if jpeg)
            connection.executemany("INSERT INTO thumbnails VALUES (?, ?)", jpegs)
            _grow_count(connection, len(items) - removed)
            if unit is not None:
                record = (unit.name, unit.digest, unit.count, unit.bad)
                connection.execute("INSERT OR REPLACE INTO units VALUES (?, ?, ?, ?)", record)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What this thread writes inside is one write, kept whole or, if it raises, not at all.

        An error of a write inside must be let out.
        """
        with self._write():
            yield

    def delete(self, ids: Sequence[str]) -> int:
        """Remove items, durably; returns how many of the ids were there."""
        with self._write() as (connection, generation):
            removed = _remove(connection, list(dict.fromkeys(ids)), generation)
            _grow_count(connection, -removed)
        return removed

    def get(self, ids: Sequence[str]) -> dict[str, Item]:
        """The items of those ids that are there."""
        found = self._select_by_id("id, caption, source, metadata", ids)
        return {row[0]: stored_item(*row) for row in found}

    def contains(self, ids: Iterable[str]) -> set[str]:
        """Those of the ids that are there."""
        return {row[0] for row in self._select_by_id("id", list(ids))}

    def scan(self, start_after: str = "", limit: int = 100) -> list[Item]:
        """Items in the order of their ids; the last id of a page is `start_after` of the next."""
        if limit < 1:
            raise IndexStoreError(f"limit {limit} must be at least 1")
        query = "SELECT id, caption, source, metadata FROM items WHERE id > ? ORDER BY id LIMIT ?"
        return [stored_item(*row) for row in self._select(query, (start_after, limit))]

    def count(self) -> int:
        """Items in the collection."""
        return int(self._select("SELECT value FROM meta WHERE key = 'count'")[0][0])

    def generation(self) -> int:
        """Grows with every committed write, whatever process it came from."""
        return self._database.generation()

    def units(self) -> dict[str, Unit]:
        """The commit records of bulk work, by name."""
        rows = self._select("SELECT unit, digest, count, bad FROM units")
        return {row[0]: Unit(*row) for row in rows}

    def thumbnail(self, id: str) -> bytes | None:
        """A small JPEG of the item's picture, if one was kept."""
        query = "SELECT jpeg FROM thumbnails JOIN items USING (rowid) WHERE id = ?"
        rows = self._select(query, (id,))
        return rows[0][0] if rows else None

    def check_model(self, fingerprint: str) -> None:
        """IndexStoreError, naming both, if the vectors in here were made by another model."""
        if fingerprint != self.fingerprint:
            raise IndexStoreError(
                f"collection {self.name!r} was made by model {self.model_name!r} with fingerprint"
                f" {self.fingerprint[:12]}, not by the one with {fingerprint[:12]}; use that model,"
                " or make another collection: clipserve embed MODEL SOURCE --collection NEW_DIR"
            )

    def snapshot(self) -> contextlib.AbstractContextManager[int]:
        """What this thread reads inside is the state at one generation, which is yielded.

        One inside another of the same thread is the same. Nothing can be written inside.
        """
        return self._database.snapshot()

    def rowids(self, field: str = "image") -> np.ndarray:
        """Row numbers (N,) int64, ascending, of the items that have that vector."""
        _table(field)
        query = "SELECT rowid FROM items WHERE fields = ?"  # found in the index alone
        having = [fields for fields in range(1, 1 << len(FIELDS)) if fields & _bit(field)]
        return np.sort(np.concatenate([self._numbers(query, fields) for fields in having]))

    def vector_blocks(
        self, after: int = 0, field: str = "image"
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Row numbers (n,) above `after`, ascending, and their vectors (n, E), as stored.

        At most BLOCK_ROWS at a time. The state read is that of the first block.
        """
        query = f"SELECT rowid, vector FROM {_table(field)} WHERE rowid > ? ORDER BY rowid"
        for rows in self._blocks(query, after):
            yield self._unpack(rows)

    def vectors_of(self, rowids: np.ndarray, field: str = "image") -> np.ndarray:
        """Vectors (n, E) float32 of live rows (n,) that have them, in their order."""
        distinct, place = np.unique(rowids, return_inverse=True)
        query = f"SELECT rowid, vector FROM {_table(field)}"
        found, vectors = self._unpack(self._select_by_rowid(query, distinct))
        if len(found) != len(distinct):
            raise damaged(f"collection {self.name!r}")
        return vectors[np.argsort(found)[place]].astype(np.float32)

    def metadata_blocks(self, after: int = 0) -> Iterator[tuple[np.ndarray, list[str]]]:
        """Row numbers (n,) above `after`, ascending, and their metadata as JSON, of all items.

        At most BLOCK_ROWS at a time. The state read is that of the first block.
        """
        query = "SELECT rowid, metadata FROM items WHERE rowid > ? ORDER BY rowid"
        for rows in self._blocks(query, after):
            rowids = np.fromiter((row[0] for row in rows), np.int64, len(rows))
            yield rowids, [row[1] for row in rows]

    def ids_of(self, rowids: np.ndarray) -> dict[int, str]:
        """Row number -> id, of live rows."""
        return dict(self._select_by_rowid("SELECT rowid, id FROM items", rowids))

    def items_of(self, rowids: np.ndarray) -> dict[int, Item]:
        """Row number -> item, of live rows."""
        query = "SELECT rowid, id, caption, source, metadata FROM items"
        rows = self._select_by_rowid(query, rowids)
        return {rowid: stored_item(*row) for rowid, *row in rows}

    def sizes_of(self, rowids: np.ndarray) -> dict[int, int]:
        """Row number -> bytes of caption, source and metadata, of live rows; they are not read."""
        size = "octet_length(caption) + octet_length(source) + octet_length(metadata)"
        return dict(self._select_by_rowid(f"SELECT rowid, {size} FROM items", rowids))

    def page_rowids(self, start_after: str = "", limit: int = 100) -> np.ndarray:
        """Row numbers of the items that `scan` gives, in its order."""
        query = "SELECT rowid FROM items WHERE id > ? ORDER BY id LIMIT ?"
        rows = self._select(query, (start_after, limit))
        return np.array([row[0] for row in rows], dtype=np.int64)

    def thumbnails_of(self, rowids: np.ndarray) -> dict[int, bytes]:
        """Row number -> thumbnail, of the live rows that have one."""
        return dict(self._select_by_rowid("SELECT rowid, jpeg FROM thumbnails", rowids))

    def thumbnail_sizes_of(self, rowids: np.ndarray) -> dict[int, int]:
        """Row number -> bytes of the thumbnail, of the live rows that have one; none is read."""
        query = "SELECT rowid, octet_length(jpeg) FROM thumbnails"
        return dict(self._select_by_rowid(query, rowids))

    def rowids_of(self, ids: Iterable[str]) -> dict[str, int]:
        """Id -> row number, of those ids that are there."""
        return dict(self._select_by_id("id, rowid", list(ids)))

    def deleted_since(self, generation: int) -> np.ndarray | None:
        """Row numbers removed after `generation`; None if that is too long ago to be remembered."""
        if not 0 <= self.generation() - generation <= REMEMBERED_WRITES:
            return None
        return self._numbers("SELECT removed FROM deletions WHERE generation > ?", generation)

    def close(self) -> None:
        """Close the connections of all threads; none may be using the collection any more."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _write(self) -> Iterator[tuple[apsw.Connection, int]]:
        with self._database.write() as (connection, generation):
            yield connection, generation
            query = "DELETE FROM deletions WHERE generation <= ?"
            connection.execute(query, (generation - REMEMBERED_WRITES,))

    def _select(self, query: str, parameters: Sequence[Any] = ()) -> list[Any]:
        return self._database.select(query, parameters)

    def _select_by_id(self, columns: str, ids: Sequence[str]) -> list[Any]:
        with self._database.errors():
            return _select_by_id(self._database.connection(), columns, ids)

    def _select_by_rowid(self, query: str, rowids: np.ndarray) -> list[Any]:
        numbers = json.dumps(rowids.tolist())
        return self._select(f"{query} WHERE rowid IN (SELECT value FROM json_each(?))", (numbers,))

    def _blocks(self, query: str, *parameters: int) -> Iterator[list[Any]]:
        """The rows of a query, BLOCK_ROWS at a time."""
        with self._database.errors():
            cursor = self._database.connection().execute(query, parameters)
            while rows := list(itertools.islice(cursor, BLOCK_ROWS)):
                yield rows

    def _numbers(self, query: str, *parameters: int) -> np.ndarray:
        """The one column of a query, int64; there may be millions."""
        parts = [np.zeros(0, dtype=np.int64)]
        for rows in self._blocks(query, *parameters):
            parts.append(np.fromiter((row[0] for row in rows), np.int64, len(rows)))
        return np.concatenate(parts)

    def _unpack(self, rows: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        rowids = np.fromiter((row[0] for row in rows), np.int64, len(rows))
        data = b"".join(row[1] for row in rows)
        if len(data) != len(rows) * self.embed_dim * self.dtype.itemsize:
            raise damaged(f"collection {self.name!r}")
        return rowids, np.frombuffer(data, self.dtype).reshape(len(rows), self.embed_dim)


def _create(path: Path, fingerprint: str, model_name: str, embed_dim: int, dtype: str) -> bool:
    """Whether there was none."""
    if embed_dim < 1:
        raise IndexStoreError(f"embed_dim {embed_dim} must be at least 1")
    if dtype not in DTYPES:
        raise IndexStoreError(f"dtype {dtype!r} is not allowed; use one of {', '.join(DTYPES)}")
    meta = {"fingerprint": fingerprint, "model_name": model_name, "embed_dim": embed_dim}
    return create(path, _SCHEMA, meta | {"dtype": dtype, "count": 0})


def _bit(field: str) -> int:
    """Of the column `fields`."""
    return 1 << FIELDS.index(field)


def _table(field: str) -> str:
    if field not in FIELDS:
        raise IndexStoreError(f"field {field!r} is not allowed; use one of {', '.join(FIELDS)}")
    return f"vectors_{field}"


def _select_by_id(connection: apsw.Connection, columns: str, ids: Sequence[str]) -> list[Any]:
    rows: list[Any] = []
    for start in range(0, len(ids), _IDS_PER_QUERY):
        some = ids[start : start + _IDS_PER_QUERY]
        marks = ", ".join("?" * len(some))
        query = f"SELECT {columns} FROM items WHERE id IN ({marks})"
        rows += fetch(connection, query, some)
    return rows


def _carry_over(
    connection: apsw.Connection, ids: list[str], first: int, brought: Sequence[str]
) -> list[int]:
    """Give what is not brought anew of items that are there their coming rows, from `first` on.

    Returns the fields that each item keeps, as bits.
    """
    found = _select_by_id(connection, "id, rowid, fields", ids)
    old = {id: (rowid, fields) for id, rowid, fields in found}
    moves = [(first + i, old[id][0]) for i, id in enumerate(ids) if id in old]
    fields = [field for field in FIELDS if field not in brought]
    tables = [f"vectors_{field}" for field in fields]
    for table in [*tables, *(() if "thumbnail" in brought else ("thumbnails",))]:
        connection.executemany(f"UPDATE {table} SET rowid = ? WHERE rowid = ?", moves)
    kept = sum(_bit(field) for field in fields)
    return [old[id][1] & kept if id in old else 0 for id in ids]


def _remove(connection: apsw.Connection, ids: list[str], generation: int) -> int:
    """Take the rows of those ids out and remember that; returns how many there were."""
    rows = _select_by_id(connection, "rowid", ids)
    for table in ("items", "vectors_image", "vectors_text", "thumbnails"):
        connection.executemany(f"DELETE FROM {table} WHERE rowid = ?", rows)
    removed = ((generation, rowid) for (rowid,) in rows)
    connection.executemany("INSERT INTO deletions VALUES (?, ?)", removed)
    return len(rows)


def _next_rowid(connection: apsw.Connection) -> int:
    """Above every row number that was ever used."""
    rows = fetch(connection, "SELECT seq FROM sqlite_sequence WHERE name = 'items'")
    return int(rows[0][0]) + 1 if rows else 1


def _grow_count(connection: apsw.Connection, by: int) -> None:
    connection.execute("UPDATE meta SET value = value + ? WHERE key = 'count'", (by,))
