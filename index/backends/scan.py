"""Fresh rows in memory, all compared with every query.

A `ScanBackend` is never changed: `append` and `remove` return another one that shares what did not
change. Its labels are row numbers, and a mask is of `rowids`.

Legend: Q queries, n rows, E embedding.
"""

import functools
from dataclasses import dataclass
from typing import Self

import numpy as np

from index.collection import BLOCK_ROWS

_FEW = 0.25
"""of a block's rows: where fewer are wanted, to copy them costs less than to compare all"""


def float32_error(embed_dim: int) -> float:
    """How far a float32 inner product of two vectors of about unit length may be off.

    gamma_E |q| |x| of any order of summation (Higham, Accuracy and Stability, eq. 3.5), rounding
    the query to float32 before, and the exact score to float32 after; 1 % for what gamma_E is above
    E u and the lengths above 1.
    """
    return 1.01 * (embed_dim + 2) * 2.0**-24


@dataclass(frozen=True)
class _Block:
    """Up to BLOCK_ROWS rows. Later blocks may share the buffers and use more of their rows."""

    rowids: np.ndarray
    """(BLOCK_ROWS,) int64, ascending"""
    vectors: np.ndarray
    """(BLOCK_ROWS, E) float32"""
    alive: np.ndarray
    """(n,) bool, of the rows in use"""

    @classmethod
    def of(cls, rowids: np.ndarray, vectors: np.ndarray) -> Self:
        empty = cls(  # memory that nobody writes to costs nothing
            np.empty(BLOCK_ROWS, dtype=np.int64),
            np.empty((BLOCK_ROWS, vectors.shape[1]), dtype=np.float32),
            np.ones(0, dtype=bool),
        )
        return empty.extend(rowids, vectors)

    @functools.cached_property
    def live(self) -> np.ndarray:
        """Places in the buffers of the rows that are alive, ascending."""
        return np.flatnonzero(self.alive)

    def extend(self, rowids: np.ndarray, vectors: np.ndarray) -> Self:
        start, end = len(self.alive), len(self.alive) + len(rowids)
        self.rowids[start:end] = rowids
        self.vectors[start:end] = vectors
        return type(self)(
            self.rowids, self.vectors, np.append(self.alive, np.ones(len(rowids), dtype=bool))
        )

    def remove(self, rowids: np.ndarray) -> Self:
        """Without those rows; a block that is mostly dead is packed."""
        own = self.rowids[: len(self.alive)]
        alive = self.alive & ~np.isin(own, rowids)
        if alive.sum() * 2 >= len(alive):
            return type(self)(self.rowids, self.vectors, alive)
        return type(self).of(own[alive], self.vectors[: len(alive)][alive])

    def search(
        self, queries: np.ndarray, k: int, mask: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The largest k, in no order; all if there are fewer. mask is of the live rows."""
        rows, size = self.live if mask is None else self.live[mask], len(self.alive)
        k = min(k, len(rows))
        if len(rows) < _FEW * size:
            scores, rowids = queries @ self.vectors[rows].T, self.rowids[rows]  # (Q, n), (n,)
        else:
            scores, rowids = queries @ self.vectors[:size].T, self.rowids[:size]
            if len(rows) < size:
                unwanted = np.ones(size, dtype=bool)
                unwanted[rows] = False
                scores[:, unwanted] = -np.inf
        if k == len(rowids):
            return scores, np.broadcast_to(rowids, scores.shape)
        top = np.argpartition(scores, len(rowids) - k, axis=1)[:, len(rowids) - k :]  # (Q, k)
        return np.take_along_axis(scores, top, axis=1), rowids[top]


class ScanBackend:
    """Vectors as matrices, all scanned for every query.

    `append` writes into buffers that older backends share, beyond the rows they look at, so only
    the newest one may be appended to.
    """

    max_breadth = 1
    lists = None

    def __init__(self, embed_dim: int, blocks: tuple[_Block, ...] = ()) -> None:
        self._embed_dim = embed_dim
        self._blocks = blocks
        self._starts = np.cumsum([0, *(len(block.live) for block in blocks)])
        self.error = float32_error(embed_dim)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def errors(self, queries: np.ndarray, last: np.ndarray) -> np.ndarray:
        return np.full(len(queries), self.error)

    @functools.cached_property
    def rowids(self) -> np.ndarray:
        """Row numbers (n,) int64, ascending."""
        parts = [block.rowids[block.live] for block in self._blocks]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])

    def vectors_of(self, rowids: np.ndarray) -> np.ndarray:
        """Vectors (m, E) float32 of rows (m,) that are in here; of one that is not, any other."""
        places = np.searchsorted(self.rowids, rowids).clip(max=len(self) - 1)
        vectors = np.empty((len(places), self._embed_dim), dtype=np.float32)
        blocks = np.searchsorted(self._starts, places, side="right") - 1
        for i in np.unique(blocks):
            own, block = blocks == i, self._blocks[i]
            vectors[own] = block.vectors[block.live[places[own] - self._starts[i]]]
        return vectors

    def append(self, rowids: np.ndarray, vectors: np.ndarray) -> "ScanBackend":
        """With those rows, numbered above all others."""
        blocks = list(self._blocks)
        room = BLOCK_ROWS - len(blocks[-1].alive) if blocks else 0
        if room and len(rowids):
            blocks[-1] = blocks[-1].extend(rowids[:room], vectors[:room])
            rowids, vectors = rowids[room:], vectors[room:]
        for start in range(0, len(rowids), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            blocks.append(_Block.of(rowids[rows], vectors[rows]))
        return ScanBackend(self._embed_dim, tuple(blocks))

    def remove(self, rowids: np.ndarray) -> "ScanBackend":
        """Without those rows, as far as they are here."""
        rowids = np.sort(rowids)
        blocks = []
        for block in self._blocks:
            first, last = block.rowids[0], block.rowids[len(block.alive) - 1]
            inside = rowids[np.searchsorted(rowids, first) : np.searchsorted(rowids, last, "right")]
            kept = block.remove(inside) if len(inside) else block
            if len(kept.live):
                blocks.append(kept)
        return ScanBackend(self._embed_dim, tuple(blocks))

    def search(
        self, queries: np.ndarray, k: int, breadth: int = 1, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        width = min(k, len(self))
        scores = [np.full((len(queries), width), -np.inf, dtype=np.float32)]
        labels = [np.full((len(queries), width), -1, dtype=np.int64)]
        for block, start in zip(self._blocks, self._starts[:-1], strict=True):
            own = None if mask is None else mask[start : start + len(block.live)]
            found, rowids = block.search(queries, width, own)
            scores.append(found)
            labels.append(rowids)
        every, rowids = np.concatenate(scores, axis=1), np.concatenate(labels, axis=1)
        order = np.argsort(-every, axis=1, kind="stable")[:, :width]
        return np.take_along_axis(every, order, axis=1), np.take_along_axis(rowids, order, axis=1)
