"""What an index is: its description, and how far to search it. `cache.py` stores and reads it.

Legend: N vectors, E embedding.
"""

import dataclasses
from dataclasses import dataclass
from typing import TypedDict

import numpy as np


class File(TypedDict):
    name: str
    size: int
    """bytes"""
    sha256: str


class Point(TypedDict):
    """One measured setting."""

    k: int
    breadth: int
    """lists searched (IVF), or candidates kept on the way (HNSW)"""
    fetch: int
    """candidates taken and scored again exactly"""
    recall: float
    """fraction of the true best k that were found"""
    ms: float
    """milliseconds a query, many at once"""


class Asked(TypedDict):
    """What decided the kind of index, as `choose` takes it."""

    kind: str
    exact_limit: int
    memory_bytes: int | None
    """None if none were given"""


@dataclass(frozen=True)
class IndexInfo:
    """What an index is, why, and what it was measured to find."""

    kind: str
    """ "exact", or FAISS's name of it, such as "IVF2048,SQ8" """
    reason: str
    field: str
    """the vectors it is of: "image" or "text" """
    count: int
    embed_dim: int
    dtype: str
    """of the stored vectors"""
    generation: int
    """of the collection when it was read"""
    max_rowid: int
    """rows above it came later and are scanned beside the index"""
    fingerprint: str
    """of the model whose vectors are in it"""
    identity: str
    """of the collection"""
    faiss_version: str
    seconds: float
    """to build it"""
    memory_bytes: int = 0
    """that it takes beside the vectors, which are read from disk as they are needed"""
    queries: str = ""
    """what it was tuned with"""
    recall_target: float = 1.0
    asked: Asked | None = None
    """for an index to be built anew in the same way; None if it was not kept"""
    tuned: dict[int, Point] = dataclasses.field(default_factory=dict)
    """k -> the cheapest setting that reaches the target, or the best there is"""
    filtered: dict[float, float] = dataclasses.field(default_factory=dict)
    """fraction of the vectors that a filter lets through -> how much more breadth it takes"""
    curve: list[Point] = dataclasses.field(default_factory=list)
    files: dict[str, File] = dataclasses.field(default_factory=dict)
    """ "faiss", "vectors", "rows", "queries" """

    @property
    def size_bytes(self) -> int:
        """On disk."""
        return sum(file["size"] for file in self.files.values())

    @property
    def bytes_per_vector(self) -> float:
        """Of memory."""
        return self.memory_bytes / max(1, self.count)

    def plan(self, k: int, selectivity: float = 1.0) -> tuple[int, int]:
        """Breadth and fetch for k of the vectors, of which a filter lets `selectivity` through.

        Between the ks and selectivities that were measured what they need is interpolated; beyond
        them it grows in proportion.
        """
        if not self.tuned:
            return 1, overfetch(k)
        ks = sorted(self.tuned)
        beyond = max(1.0, k / ks[-1])
        breadth = np.interp(k, ks, [self.tuned[at]["breadth"] for at in ks]) * beyond
        fetch = np.interp(k, ks, [self.tuned[at]["fetch"] for at in ks]) * beyond
        breadth *= self._multiple(selectivity)
        return int(np.ceil(breadth)), max(k, int(np.ceil(fetch)))

    def _multiple(self, selectivity: float) -> float:
        measured = {1.0: 1.0} | self.filtered
        at = sorted(measured)
        below = max(1.0, at[0] / max(selectivity, 1e-9))
        # Over the logarithm: the measured ones are 50, 10 and 3 %.
        places = np.log(at)
        return below * float(
            np.interp(np.log(max(selectivity, 1e-9)), places, [measured[s] for s in at])
        )


def overfetch(k: int) -> int:
    """Candidates to take so that the best k of them, scored exactly, are the right ones."""
    return 2 * k + 16
