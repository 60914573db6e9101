"""The inverted lists of a FAISS index: which rows they hold, and which of them a query is near to.

Legend: Q queries, N vectors, L lists, B lists that a query is near to, E embedding.
"""

from typing import Any

import faiss as untyped_faiss
import numpy as np

faiss: Any = untyped_faiss  # its stubs lack half of what is used here


class InvertedLists:
    """Of an index that is never changed any more; 4 bytes a vector beside it."""

    def __init__(self, index: Any) -> None:
        self._quantizer = index.quantizer
        lists = index.invlists
        self.sizes = np.array([lists.list_size(i) for i in range(index.nlist)], dtype=np.int64)
        """(L,)"""
        self._ends = np.cumsum(self.sizes)
        self._places = np.empty(int(self.sizes.sum()), dtype=np.int32)  # list after list
        for number, (size, end) in enumerate(zip(self.sizes.tolist(), self._ends, strict=True)):
            if size:
                ids = faiss.rev_swig_ptr(lists.get_ids(number), size)
                self._places[end - size : end] = ids

    def count(self, mask: np.ndarray) -> np.ndarray:
        """Of each list (L,), how many a mask (N,) of the positions lets through."""
        passed = np.zeros(len(self._places) + 1, dtype=np.int64)
        np.cumsum(mask[self._places], out=passed[1:])
        return np.asarray(passed[self._ends] - passed[self._ends - self.sizes])

    def nearest(self, queries: np.ndarray, count: int) -> np.ndarray:
        """The lists (Q, B) that a search of that breadth looks into, in their order."""
        return np.asarray(self._quantizer.search(queries, min(count, len(self.sizes)))[1])
