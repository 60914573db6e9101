"""Candidates for a query, behind one interface: FAISS on CPU or GPU, or every vector compared.

Labels are positions 0..N-1 in the matrix a backend was made of. A backend is never changed once it
is searched, and many threads may search it. Start at `Backend` for what all of them do, at
`make_backend` for which of them answers.

Legend: Q queries, N vectors, E embedding.
"""

import logging
from typing import Protocol

import numpy as np

from clipserve.errors import ConfigError
from index.backends.inverted import InvertedLists
from index.cache import Cache

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """Finds the vectors with the largest inner products."""

    @property
    def max_breadth(self) -> int:
        """The breadth at which nothing is passed over."""

    @property
    def error(self) -> float:
        """How far any score may be from the true cosine. Infinite for an index that passes vectors
        over without looking at them."""

    @property
    def lists(self) -> InvertedLists | None:
        """That its breadth is counted in; None if it has none."""

    def errors(self, queries: np.ndarray, last: np.ndarray) -> np.ndarray:
        """At most `error` (Q,), so that what a search of the queries (Q, E) passed over is bounded.

        No vector has a cosine above the last score that was found, `last` (Q,), and this together,
        but those that were found.
        """

    def __len__(self) -> int:
        """Vectors it can find."""

    def search(
        self, queries: np.ndarray, k: int, breadth: int, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores (Q, min(k, N)) float32, descending, and labels of that shape, int64.

        queries (Q, E) float32 of unit length, contiguous; mask (N,) bool: these positions alone.
        Score -inf and label -1 where there is none.
        """


def resolve_device(name: str) -> str:
    """ "auto" is all GPUs together, if there are any. ConfigError for a device that is not there.

    "cpu", "cuda" (all of them) or "cuda:N".
    """
    if name == "cpu":
        return name
    kind, colon, number = name.partition(":")
    if name != "auto" and (kind != "cuda" or (colon and not number.isdecimal())):
        raise ConfigError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:N")
    num_gpus = _num_gpus()
    if name == "auto":
        return "cuda" if num_gpus else "cpu"
    if int(number or 0) >= num_gpus:
        raise ConfigError(f"device {name!r}: {num_gpus} GPUs are here; use cpu or install [gpu]")
    return f"cuda:{int(number)}" if colon else "cuda"


def make_backend(cache: Cache, device: str) -> Backend:
    """What searches an index on a resolved device; on the CPU where a GPU will not do.

    A GPU that has room for all vectors compares all of them, which is exact; up to which size it is
    also faster there than an index is not measured.
    """
    from index.backends import torch_exact
    from index.backends.faiss_cpu import FaissBackend

    if device != "cpu" and (backend := torch_exact.on_gpus(cache.vectors, device)) is not None:
        return backend
    if cache.index is None:
        return torch_exact.TorchBackend(cache.vectors)
    cpu = FaissBackend(cache.index)
    if device == "cpu":
        return cpu
    from index.backends import faiss_gpu

    return faiss_gpu.on_gpus(cpu, device) or cpu


def _num_gpus() -> int:
    """That torch or FAISS can use."""
    import torch

    from index.backends.faiss_cpu import num_faiss_gpus

    return max(torch.cuda.device_count() if torch.cuda.is_available() else 0, num_faiss_gpus())
