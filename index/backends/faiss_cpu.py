"""FAISS indexes on the CPU: flat, inverted lists (IVF) and graphs (HNSW), any of their codes.

Legend: Q queries, N vectors, E embedding.
"""

import functools
from typing import Any

import faiss as untyped_faiss
import numpy as np

from index.backends.inverted import InvertedLists
from index.backends.scan import float32_error

faiss: Any = untyped_faiss  # its stubs lack half of what is used here

_BLAS_FROM = 2048
"""queries times E, from which on flat search, and so the choice of lists, is a matrix product

FAISS 1.15.1 ships 128000, with which 64 queries of E = 512 take eight times as long as with this;
with 20, as before it, one query took four times as long (one core, 4,096 vectors, 2026-11-22).
"""


class FaissBackend:
    """A FAISS index in memory, filled in the order of the positions. Many threads may search it."""

    def __init__(self, index: Any) -> None:
        set_blas_threshold()
        self.index = index
        self.max_breadth = 1
        if is_ivf(index):
            self.max_breadth = int(index.nlist)
        elif is_graph(index):
            self.max_breadth = max(1, len(self))
        is_exact = isinstance(index, faiss.IndexFlat)
        self.error = float32_error(index.d) if is_exact else float("inf")

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def errors(self, queries: np.ndarray, last: np.ndarray) -> np.ndarray:
        return np.full(len(queries), self.error)

    @functools.cached_property
    def lists(self) -> InvertedLists | None:
        return InvertedLists(self.index) if is_ivf(self.index) else None

    def search(
        self, queries: np.ndarray, k: int, breadth: int, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        width = min(k, len(self))
        if width == 0:
            return no_hits(len(queries), 0)
        parameters = search_parameters(self.index, breadth, mask)
        return mark_missing(*self.index.search(queries, width, params=parameters))


def search_parameters(index: Any, breadth: int, mask: np.ndarray | None = None) -> Any:
    """Breadth and mask in one object, made anew for every call.

    A parameters object without a breadth resets it to FAISS's smallest default, whatever the index
    was set to; and FAISS changes the object while it searches, which crashes where it is shared.
    """
    selector = {}
    if mask is not None:
        bits = np.packbits(mask, bitorder="little")
        selector = {"sel": faiss.IDSelectorBitmap(bits)}
    if is_ivf(index):
        return faiss.SearchParametersIVF(nprobe=min(breadth, index.nlist), **selector)
    if is_graph(index):
        return faiss.SearchParametersHNSW(efSearch=breadth, **selector)
    return faiss.SearchParameters(**selector)


def is_ivf(index: Any) -> bool:
    return isinstance(index, faiss.IndexIVF)


def is_graph(index: Any) -> bool:
    return isinstance(index, faiss.IndexHNSW)


def mark_missing(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-inf, for FAISS's least float, where no vector was found."""
    scores[labels < 0] = -np.inf
    return scores, labels


def no_hits(num_queries: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels where nothing can be found."""
    shape = (num_queries, width)
    return np.full(shape, -np.inf, dtype=np.float32), np.full(shape, -1, dtype=np.int64)


def set_blas_threshold() -> None:
    """Matrix products where they are faster; for all of this process."""
    faiss.cvar.distance_compute_blas_threshold = _BLAS_FROM


def num_faiss_gpus() -> int:
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0
