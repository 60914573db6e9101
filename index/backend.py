"""Candidates for a query: FAISS on CPU or GPU, and a matrix in memory, behind one interface.

A backend is never changed once it is searched: `MemoryBackend.append` and `remove` return another
one, a FAISS index is built anew. Labels are the collection's row numbers. Start at `Backend`.

Legend: Q queries, N vectors, E embedding.
"""

import functools
import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, Self

import faiss as untyped_faiss
import numpy as np

from clipserve.errors import ConfigError
from index.collection import BLOCK_ROWS

logger = logging.getLogger(__name__)
faiss: Any = untyped_faiss  # its stubs lack half of what is used here

_GPU_TEMPORARY_BYTES = 256 * 2**20
_GPU_MOST = 2048
"""largest k and nprobe of FAISS on a GPU without cuVS (faiss/gpu/utils/DeviceDefs.cuh)"""


class Backend(Protocol):
    """Finds the vectors with the largest inner products."""

    max_breadth: int
    """the breadth at which nothing is passed over"""

    def __len__(self) -> int:
        """Vectors it can find."""

    def breadth(self, k: int) -> int:
        """The breadth to search with when k are wanted."""

    def search(self, queries: np.ndarray, k: int, breadth: int) -> tuple[np.ndarray, np.ndarray]:
        """scores (Q, k) float32, descending, and labels (Q, k); label -1 where there is none."""


def overfetch(k: int) -> int:
    """Candidates to take so that the best k of them, scored exactly, are the right ones."""
    return 2 * k + 16


def resolve_device(name: str) -> str:
    """ "auto" is a GPU if FAISS sees one. ConfigError for a device that is not there."""
    num_gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if name == "auto":
        return "cuda:0" if num_gpus else "cpu"
    kind, _, number = name.partition(":")
    if name == "cpu":
        return name
    if kind != "cuda" or not (number or "0").isdecimal():
        raise ConfigError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N")
    if int(number or 0) >= num_gpus:
        raise ConfigError(f"device {name!r}: FAISS sees {num_gpus} GPUs; use cpu or install [gpu]")
    return f"cuda:{int(number or 0)}"


def exact_index(embed_dim: int, blocks: Iterable[tuple[np.ndarray, np.ndarray]]) -> Any:
    """A FAISS index that scans all of (rowids, vectors) blocks."""
    index = faiss.IndexIDMap(faiss.IndexFlatIP(embed_dim))
    for rowids, vectors in blocks:
        index.add_with_ids(vectors, rowids)
    return index


def make_backend(index: Any, nprobe: dict[int, int], device: str) -> Backend:
    """A FAISS index on a resolved device; on the CPU, with a warning, where a GPU will not do."""
    set_blas_threshold()
    cpu = CpuBackend(index, nprobe)
    if device == "cpu":
        return cpu
    try:
        return GpuBackend(cpu, int(device.removeprefix("cuda:")))
    except RuntimeError as error:
        first_line = str(error).strip().splitlines()[0]
        logger.warning("the index stays on the CPU, %s will not take it: %s", device, first_line)
        return cpu


def set_blas_threshold() -> None:
    """Batched flat search by matrix products again: FAISS 1.15.1 ships 128000 for its old 20."""
    faiss.cvar.distance_compute_blas_threshold = 20


class CpuBackend:
    """A FAISS index in memory. Many threads may search it."""

    def __init__(self, index: Any, nprobe: dict[int, int]) -> None:
        self.index = index
        self._nprobe = nprobe
        self.max_breadth = int(index.nlist) if nprobe else 1

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def breadth(self, k: int) -> int:
        """The nprobe measured for the smallest k at or above this one."""
        enough = [nprobe for tuned, nprobe in sorted(self._nprobe.items()) if tuned >= k]
        return (enough or [self.max_breadth])[0]

    def search(self, queries: np.ndarray, k: int, breadth: int) -> tuple[np.ndarray, np.ndarray]:
        scores, labels = self.index.search(
            queries, min(k, len(self)), params=search_parameters(self._nprobe, breadth)
        )
        return scores, labels


def search_parameters(nprobe: dict[int, int], breadth: int) -> Any:
    """Made anew for every call: FAISS changes the object while it searches."""
    return faiss.SearchParametersIVF(nprobe=breadth) if nprobe else None


class GpuBackend:
    """A GPU's copy of a FAISS index; the CPU's copy stays the truth.

    One thread at a time, as FAISS demands of everything that shares a GPU's resources. What a GPU
    cannot do (very large k or nprobe) the CPU does.
    """

    def __init__(self, cpu: CpuBackend, gpu: int) -> None:
        self._cpu = cpu
        self.max_breadth = cpu.max_breadth
        resources, self._lock = _gpu_resources()
        with self._lock:
            self._index = faiss.index_cpu_to_gpu(resources, gpu, cpu.index)

    def __len__(self) -> int:
        return len(self._cpu)

    def breadth(self, k: int) -> int:
        return self._cpu.breadth(k)

    def search(self, queries: np.ndarray, k: int, breadth: int) -> tuple[np.ndarray, np.ndarray]:
        if min(k, len(self)) > _GPU_MOST or breadth > _GPU_MOST:
            return self._cpu.search(queries, k, breadth)
        parameters = search_parameters(self._cpu._nprobe, breadth)
        with self._lock:
            scores, labels = self._index.search(queries, min(k, len(self)), params=parameters)
        return scores, labels


@functools.cache
def _gpu_resources() -> tuple[Any, threading.Lock]:
    """One for the process: each takes GPU memory that is not given back before it dies."""
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(_GPU_TEMPORARY_BYTES)
    return resources, threading.Lock()


@dataclass(frozen=True)
class _Block:
    """Up to BLOCK_ROWS rows. Later blocks may share the buffers and use more of their rows."""

    rowids: np.ndarray
    """(BLOCK_ROWS,) int64, ascending"""
    vectors: np.ndarray
    """(BLOCK_ROWS, E)"""
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

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The largest k, in no order; score -inf and label -1 for what is dead."""
        n = len(self.alive)
        scores = queries @ self.vectors[:n].T  # (Q, n)
        if not self.alive.all():
            scores[:, ~self.alive] = -np.inf
        if k >= n:
            return scores, np.where(scores > -np.inf, self.rowids[:n], -1)
        top = np.argpartition(scores, n - k, axis=1)[:, n - k :]  # (Q, k)
        scores = np.take_along_axis(scores, top, axis=1)
        return scores, np.where(scores > -np.inf, self.rowids[top], -1)


class MemoryBackend:
    """Vectors as matrices, all scanned for every query. Many threads may search it.

    `append` writes into buffers that older backends share, beyond the rows they look at, so only
    the newest one may be appended to.
    """

    max_breadth = 1

    def __init__(self, embed_dim: int, blocks: tuple[_Block, ...] = ()) -> None:
        self._embed_dim = embed_dim
        self._blocks = blocks
        self._count = sum(int(block.alive.sum()) for block in blocks)
        self.error = embed_dim * 2.0**-24
        """how far a score may be off: a float32 sum of E products of unit vectors"""

    def __len__(self) -> int:
        return self._count

    def append(self, rowids: np.ndarray, vectors: np.ndarray) -> "MemoryBackend":
        """With those rows, numbered above all others."""
        blocks = list(self._blocks)
        room = BLOCK_ROWS - len(blocks[-1].alive) if blocks else 0
        if room and len(rowids):
            blocks[-1] = blocks[-1].extend(rowids[:room], vectors[:room])
            rowids, vectors = rowids[room:], vectors[room:]
        for start in range(0, len(rowids), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            blocks.append(_Block.of(rowids[rows], vectors[rows]))
        return MemoryBackend(self._embed_dim, tuple(blocks))

    def remove(self, rowids: np.ndarray) -> "MemoryBackend":
        """Without those rows, as far as they are here."""
        rowids = np.sort(rowids)
        blocks = []
        for block in self._blocks:
            first, last = block.rowids[0], block.rowids[len(block.alive) - 1]
            inside = rowids[np.searchsorted(rowids, first) : np.searchsorted(rowids, last, "right")]
            kept = block.remove(inside) if len(inside) else block
            if len(kept.alive):
                blocks.append(kept)
        return MemoryBackend(self._embed_dim, tuple(blocks))

    def breadth(self, k: int) -> int:
        return 1

    def search(
        self, queries: np.ndarray, k: int, breadth: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        parts = [block.search(queries, k) for block in self._blocks]
        if not parts:
            return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        scores = np.concatenate([part[0] for part in parts], axis=1)
        labels = np.concatenate([part[1] for part in parts], axis=1)
        order = np.argsort(-scores, axis=1)[:, : min(k, len(self))]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(labels, order, axis=1)
