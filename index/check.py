"""Is a collection whole? Names what is not, and mends what can be made again from the rest.

`check` reads every page of the database, whose checksums SQLite verifies, and holds what it read
against the rules of `collection.py`. The note of the last promised write is written again where
it is damaged, and damaged indexes are built again, from vectors that were found to be whole.

Legend: N items, E embedding.
"""

import contextlib
import itertools
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipserve.errors import ClipserveError, IndexStoreError
from clipserve.files import sha256
from index import acknowledged, cache
from index.acknowledged import ACKNOWLEDGED
from index.build import rebuild
from index.collection import BLOCK_ROWS, FIELDS, REMEMBERED_WRITES, Collection
from index.database import DATABASE, Database, is_writable
from index.info import IndexInfo
from index.items import LENGTH_TOLERANCE, check_id
from index.sqlite import fetch, store_errors, transaction

_NAMED = 10
_ATTEMPTS = 5
_LOST_ROWS = 2**32  # more row numbers than lost writes can have used


@dataclass(frozen=True)
class CheckReport:
    """What was found. The collection is whole if there are no problems."""

    items: int
    problems: list[str]
    """what is damaged or missing, and stays so"""
    repaired: list[str]
    """what was, and is not any more"""


def check(path: Path, *, repair: bool = True, accept_loss: bool = False) -> CheckReport:
    """Read all of the collection at `path`, and say what is damaged or missing.

    Readers and writers go on meanwhile. repair: mend what can be mended, where it is writable.
    accept_loss: from now on take the collection as it is, though acknowledged writes are missing;
    nobody else may have it open then. IndexStoreError if there is no collection at all.
    """
    repair = repair and is_writable(path)
    if accept_loss and not repair:
        raise IndexStoreError(f"{path}: a loss cannot be accepted in a place that is read-only")
    try:
        database = Database.open_unproven(path, read_only=not repair)
    except IndexStoreError as error:
        if not (path / DATABASE).is_file():
            raise
        return CheckReport(0, [str(error)], [])
    with database:
        checked = _Check(database, repair)
        checked.promises(accept_loss)
        with database.snapshot():
            checked.contents()
        checked.indexes()
    return CheckReport(checked.count, checked.problems, checked.repaired)


class _Check:
    """What is known so far."""

    def __init__(self, database: Database, repair: bool) -> None:
        self.database = database
        self.repair = repair
        self.count = 0
        self.problems: list[str] = []
        self.repaired: list[str] = []
        self._rowids = np.zeros(0, dtype=np.int64)
        """of all items that could be read, ascending"""
        self._fields = np.zeros(0, dtype=np.int64)

    def promises(self, accept_loss: bool) -> None:
        """That no acknowledged write is missing."""
        database = self.database
        problem = database.missing()
        damage = database.log_problem()
        if damage is not None:
            self.problems.append(damage)
        if problem is None:
            database.trust()
        elif accept_loss:
            with store_errors(str(database.path)):
                generation = _start_anew(database)
            self._write_promise(generation)
            self.repaired.append(f"{problem.split(';')[0]}: accepted")
        elif self.repair and _is_damaged(database):
            self._write_promise(database.generation())
            self.repaired.append(f"{problem.split(';')[0]}; what is there was taken for all")
        else:
            self.problems.append(problem)

    def contents(self) -> None:
        """That every row can be read, and that they fit together."""
        self._structure()
        is_whole = self._items()
        for bit, field in enumerate(FIELDS):
            self._vectors(field, self._rowids[self._fields & (1 << bit) > 0], is_whole)
        self._rows("thumbnails", "rowid, jpeg", is_whole)
        self._deletions(is_whole)
        for table in ("meta", "units"):
            self._scan(table, f"SELECT * FROM {table}", lambda rows: None)
        if is_whole:
            self._numbers()

    def indexes(self) -> None:
        """That the files of built indexes are whole, and of this collection."""
        is_whole = not self.problems
        for field in FIELDS:
            reason = _index_problem(self.database, field)
            if reason is None:
                continue
            what = f"the index of {field} vectors: {reason}"
            if not self.repair:
                self.problems.append(f"{what}; a check that may write builds it again")
            elif not is_whole:
                self.problems.append(f"{what}; it is built again once the rest is whole")
            else:
                self._build_again(field, what)

    def _build_again(self, field: str, what: str) -> None:
        is_known = cache.read_info(self.database.path, field) is not None
        how = "as it was asked for" if is_known else "with --kind auto, what it was is not known"
        try:
            info = rebuild(Collection(self.database), field=field)
        except ClipserveError as error:
            self.problems.append(f"{what}; it could not be built again: {error}")
        else:
            self.repaired.append(f"{what}; built again {how}: {info.kind}")

    def _write_promise(self, generation: int) -> None:
        path = self.database.path
        try:
            acknowledged.write(path, self.database.identity, generation)
        except OSError as error:
            raise IndexStoreError(f"{path} cannot be written to: {error.strerror}") from error
        self.database.trust()

    def _structure(self) -> None:
        """Every page of every tree, and every index against its table."""

        def take(rows: list[Any]) -> None:
            lines = [line for row in rows for line in str(row[0]).splitlines()]
            found = [line for line in lines if line != "ok" and not line.startswith("***")]
            self.problems.extend(f"structure: {line}" for line in found[:_NAMED])

        self._scan("structure", f"PRAGMA integrity_check({_NAMED})", take)

    def _items(self) -> bool:
        """Whether all items could be read."""
        parts = [np.zeros((0, 2), dtype=np.int64)]
        wrong: list[int] = []

        def take(rows: list[Any]) -> None:
            parts.append(np.array([row[:2] for row in rows], dtype=np.int64))
            wrong.extend(row[0] for row in rows if not _is_item(*row[2:]))

        columns = "rowid, fields, id, caption, source, metadata"
        is_whole = self._rows_of("items", columns, take)
        self._rowids, self._fields = np.concatenate(parts).T
        self.count = len(self._rowids)
        self._name("have an id or metadata that cannot be", wrong)
        return is_whole

    def _vectors(self, field: str, claimed: np.ndarray, is_whole: bool) -> None:
        parts = [np.zeros(0, dtype=np.int64)]
        wrong: list[int] = []
        dtype = np.dtype(str(self.database.meta["dtype"])).newbyteorder("<")
        size = int(self.database.meta["embed_dim"]) * dtype.itemsize
        tolerance = LENGTH_TOLERANCE[dtype.name]

        def take(rows: list[Any]) -> None:
            rowids = np.array([row[0] for row in rows], dtype=np.int64)
            parts.append(rowids)
            fits = np.array([len(row[1]) == size for row in rows])
            data = b"".join(row[1] for row in rows if len(row[1]) == size)
            vectors = np.frombuffer(data, dtype).reshape(int(fits.sum()), -1).astype(np.float64)
            with np.errstate(invalid="ignore", over="ignore"):
                off = np.abs(np.linalg.norm(vectors, axis=1) - 1)
            fits[fits] = off <= tolerance  # not so for NaN
            wrong.extend(rowids[~fits].tolist())

        read = self._rows_of(f"vectors_{field}", "rowid, vector", take)
        found = np.concatenate(parts)
        self._name(f"have no {field} vector of unit length, but something else", wrong)
        if read:
            self._name(f"have no {field} vector", np.setdiff1d(claimed, found).tolist())
        if is_whole:
            self._orphans(f"vectors_{field}", np.setdiff1d(found, claimed))

    def _rows(self, table: str, columns: str, is_whole: bool) -> None:
        parts = [np.zeros(0, dtype=np.int64)]
        self._rows_of(table, columns, lambda rows: parts.append(np.array([row[0] for row in rows])))
        if is_whole:
            self._orphans(table, np.setdiff1d(np.concatenate(parts), self._rowids))

    def _deletions(self, is_whole: bool) -> None:
        alive: list[int] = []

        def take(rows: list[Any]) -> None:
            removed = np.array([row[0] for row in rows])
            there = np.searchsorted(self._rowids, removed, "right")
            there -= np.searchsorted(self._rowids, removed)
            alive.extend(removed[there > 0].tolist())

        self._scan("deletions", "SELECT removed FROM deletions", take)
        if is_whole:
            self._name("were removed, and are there", alive)

    def _numbers(self) -> None:
        """That what is counted agrees with what is there."""
        with store_errors("numbers"):
            connection = self.database.connection()
            ((count,),) = fetch(connection, "SELECT value FROM meta WHERE key = 'count'")
            ((used,),) = fetch(connection, "SELECT coalesce(max(seq), 0) FROM sqlite_sequence")
        if count != self.count:
            self.problems.append(f"the collection counts {count} items, and has {self.count}")
        if self.count and used < self._rowids[-1]:
            self.problems.append(f"row {self._rowids[-1]} is above the last one given, {used}")

    def _orphans(self, table: str, rowids: np.ndarray) -> None:
        if len(rowids):
            self.problems.append(f"{table}: {len(rowids)} rows belong to no item")

    def _scan(self, what: str, query: str, take: Callable[[list[Any]], None]) -> bool:
        """Whether all rows of the query could be read; if not it is a problem."""
        try:
            with store_errors(what):
                cursor = self.database.connection().execute(query)
                while rows := list(itertools.islice(cursor, BLOCK_ROWS)):
                    take(rows)
        except IndexStoreError as error:
            self.problems.append(str(error))
            return False
        return True

    def _rows_of(self, table: str, columns: str, take: Callable[[list[Any]], None]) -> bool:
        """All rows of a table; where that stops, row by row, and the items are named."""
        query = f"SELECT {columns} FROM {table}"
        seen = [-1]

        def remember(rows: list[Any]) -> None:
            take(rows)
            seen.append(rows[-1][0])

        if self._scan(table, f"{query} NOT INDEXED ORDER BY rowid", remember):
            return True
        lost = []
        for rowid in (rowid for rowid in self._all_rowids() if rowid > seen[-1]):
            try:
                with store_errors(table):
                    one = fetch(self.database.connection(), f"{query} WHERE rowid = ?", (rowid,))
            except IndexStoreError:
                lost.append(rowid)
            else:
                if one:
                    take(one)
        self._name(f"cannot be read from {table}", lost)
        return False

    def _all_rowids(self) -> list[int]:
        """Of all items, as far as the table or one of its indexes can be read."""
        rowids = set(self._rowids.tolist())
        for tree in ("items_id", "items_fields"):
            query = f"SELECT rowid FROM items INDEXED BY {tree}"
            with contextlib.suppress(IndexStoreError), store_errors(tree):
                rowids |= {row[0] for row in fetch(self.database.connection(), query)}
        return sorted(rowids)

    def _name(self, what: str, rowids: list[int]) -> None:
        """A problem of those items, if there are any, with the first of their ids."""
        if not rowids:
            return
        names = [self._id_of(rowid) for rowid in rowids[:_NAMED]]
        more = ", ..." if len(rowids) > _NAMED else ""
        self.problems.append(f"{len(rowids)} items {what}: {', '.join(names)}{more}")

    def _id_of(self, rowid: int) -> str:
        for tree in ("NOT INDEXED", "INDEXED BY items_id"):
            query = f"SELECT id FROM items {tree} WHERE rowid = ?"
            with contextlib.suppress(IndexStoreError), store_errors(tree):
                found = fetch(self.database.connection(), query, (rowid,))
                if found:
                    return repr(found[0][0])
        return f"row {rowid}"


def _is_item(id: str, caption: str, source: str, metadata: str) -> bool:
    try:
        check_id(id)
        return isinstance(json.loads(metadata), dict)
    except (IndexStoreError, ValueError, RecursionError):
        return False


def _is_damaged(database: Database) -> bool:
    """Whether the note of the last promised write is there, but tells nothing.

    Where it is missing the log may be as well: who copies the database alone leaves both.
    """
    try:
        acknowledged.read(database.path, database.identity)
    except IndexStoreError:
        return (database.path / ACKNOWLEDGED).exists()
    return False


def _start_anew(database: Database) -> int:
    """Make it a collection whose past nobody knows, so that nothing kept of the lost writes fits.

    Their row numbers and generations are not given again; its identity is another. Returns the
    generation.
    """
    connection = database.connection()
    promised = database.generation()
    with contextlib.suppress(IndexStoreError):
        promised = max(promised, acknowledged.read(database.path, database.identity))
    generation = promised + REMEMBERED_WRITES + 1
    identity = uuid.uuid4().hex
    with transaction(connection):
        ((used,),) = fetch(connection, "SELECT coalesce(max(seq), 0) FROM sqlite_sequence")
        connection.execute("DELETE FROM sqlite_sequence")
        connection.execute("INSERT INTO sqlite_sequence VALUES ('items', ?)", (used + _LOST_ROWS,))
        connection.execute("DELETE FROM deletions")
        new = ((generation, "generation"), (identity, "identity"))
        connection.executemany("UPDATE meta SET value = ? WHERE key = ?", new)
    database.identity = identity
    return generation


def _index_problem(database: Database, field: str) -> str | None:
    """Why the built index of a field is not to be used; None if it is, or there is none.

    It may be built again meanwhile; then the new one is looked at.
    """
    problem = None
    for _ in range(_ATTEMPTS):
        if not any(cache.folder(database.path, field).glob("[!.]*")):  # but for what a build left
            return None
        info = cache.read_info(database.path, field)
        problem = _info_problem(database, field, info)
        if problem is None or info == cache.read_info(database.path, field):
            break
    return problem


def _info_problem(database: Database, field: str, info: IndexInfo | None) -> str | None:
    folder = cache.folder(database.path, field)
    if info is None:
        return "its description is damaged, missing or of another format"
    generation = database.generation()  # after the index was described, which followed it
    if info.identity != database.identity or info.generation > generation:
        return "it was built from another collection, or from a later state of it"
    try:
        for file in info.files.values():
            if sha256(folder / file["name"]) != file["sha256"]:
                return f"{file['name']} is damaged"
    except OSError as error:
        return f"{file['name']} cannot be read: {error.strerror}"
    return None
