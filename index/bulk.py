"""Rows of files -> upserts, block by block. Start at `RowWriter`.

Legend: N rows, n of them in a block, E embedding.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from clipserve.errors import IndexStoreError
from index.collection import Collection, Item
from index.tables import ItemTable

Progress = Callable[[int, int], None]
"""called with the rows dealt with and how many there are"""

ROWS_PER_WRITE = 2048
"""some megabytes in one transaction"""
_UNIT_TOLERANCE = 1e-3  # as the collection's


class RowWriter:
    """Upserts rows block by block. What an item has beside them, a thumbnail too, stays."""

    def __init__(
        self, collection: Collection, total: int, normalize: bool, progress: Progress | None
    ) -> None:
        self.done = 0
        self._collection, self._total = collection, total
        self._normalize, self._progress = normalize, progress

    def write(
        self,
        table: ItemTable,
        items: Sequence[Item],
        vectors: Mapping[str, np.ndarray],
        there: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """One write. vectors: field -> (n, E); there: field -> which rows have one (None: all)."""
        has = np.ones((len(items), len(vectors)), bool)
        if there is not None:
            has = np.stack([there[field] for field in vectors], axis=1)
        for column, (field, matrix) in enumerate(vectors.items()):
            self._check(table, items, field, matrix, has[:, column])
        with self._collection.together():
            for kind in np.unique(has, axis=0):
                rows = np.flatnonzero((has == kind).all(axis=1))
                if not kind.any():
                    raise IndexStoreError(f"{table.path}: item {items[rows[0]].id!r} has no vector")
                given = {
                    field: self._scale(matrix[rows])
                    for is_given, (field, matrix) in zip(kind, vectors.items(), strict=True)
                    if is_given
                }
                self._collection.upsert(
                    [items[row] for row in rows.tolist()],
                    given.get("image"),
                    text_vectors=given.get("text"),
                    keep=True,
                )
        self.done += len(items)
        if self._progress is not None:
            self._progress(self.done, self._total)

    def _check(
        self,
        table: ItemTable,
        items: Sequence[Item],
        field: str,
        matrix: np.ndarray,
        has: np.ndarray,
    ) -> None:
        """IndexStoreError, naming the item, for a vector of no direction or of another length."""
        norms = _norms(matrix)
        is_good = np.isfinite(norms) & (norms > 0)
        if not self._normalize:
            is_good &= np.abs(norms - 1) <= _UNIT_TOLERANCE
        for row in np.flatnonzero(has & ~is_good)[:1].tolist():
            raise IndexStoreError(
                f"{table.path}: the {field} vector of item {items[row].id!r} has length"
                f" {norms[row]:.6g}, not 1"
                + ("" if self._normalize else "; if all are like that, have them normalized")
            )

    def _scale(self, matrix: np.ndarray) -> np.ndarray:
        wide = matrix.astype(np.float64)
        return wide / _norms(wide)[:, None] if self._normalize else wide


def check_shape(
    file: Path, shape: tuple[int, ...], table: ItemTable, collection: Collection
) -> None:
    """IndexStoreError unless vectors of that shape (N, E) belong to the table's rows."""
    if len(shape) != 2 or shape[1] != collection.embed_dim:
        raise IndexStoreError(
            f"{file} is of shape {shape}; collection {collection.name!r} takes (N,"
            f" {collection.embed_dim})"
        )
    if shape[0] != table.num_rows:
        raise IndexStoreError(
            f"{file} has {shape[0]} rows and {table.path} {table.num_rows}: they do not belong"
            " together, or one is cut short; make or fetch them again"
        )


def _norms(matrix: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        norms: np.ndarray = np.linalg.norm(np.asarray(matrix, np.float64), axis=1)
    return norms
