"""GPU copies of FAISS indexes, searched by one thread.

FAISS allows one thread at a time for everything that shares a GPU's resources, reads included, and
its resources keep their GPU memory until the process ends: so one of them for each GPU, and one
thread, which also answers searches that wait for it together. The copy on the CPU stays the truth.
Start at `on_gpus`.

Legend: Q queries, N vectors, E embedding.
"""

import functools
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from index.backends.faiss_cpu import (
    FaissBackend,
    faiss,
    mark_missing,
    num_faiss_gpus,
    search_parameters,
)
from index.backends.inverted import InvertedLists

logger = logging.getLogger(__name__)

MOST = 2048
"""largest k and nprobe of FAISS on a GPU without cuVS (faiss/gpu/utils/DeviceDefs.cuh)"""

_TEMPORARY_BYTES = 256 * 2**20
_QUERIES_TOGETHER = 1024
_starting = threading.Lock()


@dataclass(eq=False)
class _Work:
    """A search that waits for the thread."""

    backend: "FaissGpuBackend"
    queries: np.ndarray
    k: int
    breadth: int
    mask: np.ndarray | None
    answer: "Future[tuple[np.ndarray, np.ndarray]]" = field(default_factory=Future)

    def goes_with(self, other: "_Work") -> bool:
        """Whether one call can answer both."""
        return (
            self.backend is other.backend
            and self.breadth == other.breadth
            and self.mask is None
            and other.mask is None
        )


class Dispatcher:
    """One thread, which runs calls and searches in their order."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[_Work | Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="faiss-gpu", daemon=True).start()

    def call(self, function: Callable[[], Any]) -> Any:
        """What the function returns, or raises, in the thread."""
        answer: Future[Any] = Future()
        self._waiting.put(lambda: _answer(answer, function))
        return answer.result()

    def search(self, work: _Work) -> tuple[np.ndarray, np.ndarray]:
        self._waiting.put(work)
        return work.answer.result()

    def _run(self) -> None:
        left: _Work | Callable[[], None] | None = None
        while True:
            first, left = left or self._waiting.get(), None
            if not isinstance(first, _Work):
                first()
                continue
            together, num_queries = [first], len(first.queries)
            while num_queries < _QUERIES_TOGETHER:
                try:
                    left = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if not isinstance(left, _Work) or not first.goes_with(left):
                    break
                together.append(left)
                num_queries += len(left.queries)
                left = None
            _search_together(together)


class FaissGpuBackend:
    """A copy of a FAISS index on one GPU, or shared out over several.

    What a GPU cannot do the CPU does: very large k or breadth, and a mask where FAISS's own kernels
    would silently ignore it.
    """

    def __init__(self, cpu: FaissBackend, index: Any, dispatcher: Dispatcher) -> None:
        self._cpu = cpu
        self._index = index
        self._dispatcher = dispatcher
        self._takes_masks = "CUVS" in faiss.get_compile_options()
        self.max_breadth = cpu.max_breadth
        self.error = float("inf")  # also of a flat index: its vectors are rounded to half precision

    def __len__(self) -> int:
        return len(self._cpu)

    def errors(self, queries: np.ndarray, last: np.ndarray) -> np.ndarray:
        return np.full(len(queries), self.error)

    @property
    def lists(self) -> InvertedLists | None:
        return self._cpu.lists

    def search(
        self, queries: np.ndarray, k: int, breadth: int, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        width, breadth = min(k, len(self)), min(breadth, self.max_breadth)
        if not 0 < width <= MOST or breadth > MOST or (mask is not None and not self._takes_masks):
            return self._cpu.search(queries, k, breadth, mask)
        return self._dispatcher.search(_Work(self, queries, width, breadth, mask))

    def search_now(
        self, queries: np.ndarray, k: int, breadth: int, mask: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """In the dispatcher's thread."""
        parameters = search_parameters(self._cpu.index, breadth, mask)
        return mark_missing(*self._index.search(queries, k, params=parameters))


def on_gpus(cpu: FaissBackend, device: str) -> FaissGpuBackend | None:
    """A copy on "cuda" (all GPUs) or "cuda:N"; None, with a warning, if there can be none."""
    number = device.partition(":")[2]
    gpus = [int(number)] if number else list(range(num_faiss_gpus()))
    try:
        if max(gpus, default=0) >= num_faiss_gpus():
            raise RuntimeError("this FAISS sees no such GPU; install clipserve[gpu]")
        index = _dispatcher().call(lambda: _copy(cpu.index, gpus))
    except RuntimeError as error:
        first_line = str(error).strip().splitlines()[0]
        logger.warning("the index stays on the CPU, %s will not take it: %s", device, first_line)
        return None
    return FaissGpuBackend(cpu, index, _dispatcher())


def _copy(index: Any, gpus: list[int]) -> Any:
    """RuntimeError if the GPUs cannot hold such an index."""
    options = faiss.GpuMultipleClonerOptions()
    options.useFloat16 = True
    options.shard = True
    copy = faiss.index_cpu_to_gpu_multiple_py(
        [_resources(gpu) for gpu in gpus], index, options, gpus
    )
    if not isinstance(copy, (faiss.GpuIndex, faiss.IndexShards, faiss.IndexShardsIVF)):
        # For several GPUs FAISS answers with another CPU index where it knows of no GPU kind.
        raise RuntimeError(f"FAISS has no {type(index).__name__} on GPUs")
    return copy


def _dispatcher() -> Dispatcher:
    """The one of the process."""
    with _starting:
        return _start_dispatcher()


@functools.cache
def _start_dispatcher() -> Dispatcher:
    return Dispatcher()


@functools.cache
def _resources(gpu: int) -> Any:
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(_TEMPORARY_BYTES)
    return resources


def _answer(answer: "Future[Any]", function: Callable[[], Any]) -> None:
    try:
        answer.set_result(function())
    except BaseException as error:  # it is the caller's
        answer.set_exception(error)


def _search_together(together: list[_Work]) -> None:
    """One call for several searches; each gets the best k of its own queries."""
    first = together[0]
    try:
        queries = np.concatenate([work.queries for work in together])
        k = max(work.k for work in together)
        scores, labels = first.backend.search_now(queries, k, first.breadth, first.mask)
        start = 0
        for work in together:
            rows, start = slice(start, start + len(work.queries)), start + len(work.queries)
            work.answer.set_result((scores[rows, : work.k], labels[rows, : work.k]))
    except BaseException as error:  # it is the callers'
        for work in together:
            if not work.answer.done():
                work.answer.set_exception(error)
