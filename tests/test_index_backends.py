"""One contract for all backends, against numpy; then what is special to each."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest
import torch

from clipserve.errors import ConfigError
from index.backends import Backend, faiss_gpu, make_backend, resolve_device, scan, torch_exact
from index.backends.faiss_cpu import FaissBackend, num_faiss_gpus
from index.backends.faiss_gpu import Dispatcher, FaissGpuBackend
from index.backends.scan import ScanBackend, float32_error
from index.backends.torch_exact import TorchBackend
from index.cache import Cache
from index.info import IndexInfo

DIM = 24


def unit(count: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def filled(kind: str, vectors: np.ndarray) -> Any:
    index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors if len(vectors) else unit(9))
    index.add(vectors)
    return index


def faiss_backend(kind: str) -> Callable[[np.ndarray], Backend]:
    return lambda vectors: FaissBackend(filled(kind, vectors))


def dispatched(vectors: np.ndarray) -> Backend:
    """The GPU's way of answering, with the copy on the CPU."""
    cpu = FaissBackend(filled("Flat", vectors))
    return FaissGpuBackend(cpu, cpu.index, Dispatcher())


def on_faiss_gpu(vectors: np.ndarray) -> Backend:
    found = faiss_gpu.on_gpus(FaissBackend(filled("Flat", vectors)), "cuda")
    assert found
    return found


def memory(vectors: np.ndarray) -> ScanBackend:
    return ScanBackend(DIM).append(np.arange(len(vectors)), vectors)


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
needs_faiss_gpu = pytest.mark.skipif(num_faiss_gpus() == 0, reason="FAISS sees no GPU")
faiss_gpus = [pytest.mark.gpu, needs_faiss_gpu]
CLOSE = float32_error(DIM)

# (how to make it, how far its scores may be off at full breadth)
BACKENDS = [
    pytest.param(memory, CLOSE, id="scan"),
    pytest.param(faiss_backend("Flat"), CLOSE, id="faiss-flat"),
    pytest.param(faiss_backend("IVF4,Flat"), CLOSE, id="faiss-ivf"),
    pytest.param(faiss_backend("IVF4,SQfp16"), 2e-3, id="faiss-ivf-fp16"),
    pytest.param(faiss_backend("IVF4,SQ8"), 2e-2, id="faiss-ivf-sq8"),
    pytest.param(faiss_backend("HNSW32,Flat"), CLOSE, id="faiss-hnsw"),
    pytest.param(dispatched, CLOSE, id="faiss-gpu-on-cpu"),
    pytest.param(on_faiss_gpu, 2e-3, id="faiss-gpu", marks=faiss_gpus),
    pytest.param(
        lambda vectors: TorchBackend(vectors, dtype=torch.float32), CLOSE, id="torch-fp32"
    ),
    pytest.param(
        lambda vectors: TorchBackend(vectors, dtype=torch.bfloat16), 0.013, id="torch-bf16"
    ),
    pytest.param(lambda vectors: TorchBackend(vectors, "cuda"), 2e-3, id="torch-cuda", marks=gpu),
]

ROUGH_KINDS = ["IVF8,PQ12x4fs", "IVF8,PQ6x4fs", "IVF8,RaBitQ", "IVF8,RaBitQ4", "HNSW32,SQ8"]
"""of FAISS, whose codes tell little or are searched in their own way"""


def check_answer(
    backend: Backend,
    vectors: np.ndarray,
    queries: np.ndarray,
    k: int,
    mask: np.ndarray | None,
    error: float,
) -> None:
    """Nothing is wrong with an answer, as far as scores that may be off by `error` can tell."""
    scores, labels = backend.search(queries, k, backend.max_breadth, mask)
    width = min(k, len(vectors))
    assert scores.shape == labels.shape == (len(queries), width)
    assert (scores.dtype, labels.dtype) == (np.float32, np.int64)
    allowed = np.ones(len(vectors), dtype=bool) if mask is None else mask
    exact = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    count = min(width, int(allowed.sum()))
    assert (labels[:, count:] == -1).all()
    assert (scores[:, count:] == -np.inf).all()
    if not count:
        return
    scores, labels = scores[:, :count], labels[:, :count]
    assert (scores[:, 1:] <= scores[:, :-1]).all()
    for own, found, true in zip(scores, labels, exact, strict=True):
        assert len(set(found.tolist())) == count
        assert allowed[found].all()
        assert np.abs(own - true[found]).max() <= error
        others = np.setdiff1d(np.flatnonzero(allowed), found)
        assert (true[others] <= own[-1] + error).all()


@pytest.mark.parametrize(("make", "error"), BACKENDS)
def test_it_finds_what_brute_force_finds(
    make: Callable[[np.ndarray], Backend], error: float
) -> None:
    vectors, queries = unit(500), unit(20, seed=1)
    backend = make(vectors)
    assert len(backend) == 500
    for k in (1, 10, 499, 500, 700):
        check_answer(backend, vectors, queries, k, None, error)
    check_answer(backend, vectors, queries[:1], 10, None, error)
    assert backend.error == np.inf or backend.error <= error


@pytest.mark.parametrize(("make", "error"), BACKENDS)
@pytest.mark.parametrize("share", [1, 0.5, 0.1, 0.01, 0.001, 0])
def test_a_mask_lets_through_what_it_says(
    make: Callable[[np.ndarray], Backend], error: float, share: float
) -> None:
    vectors, queries = unit(1000), unit(5, seed=1)
    mask = np.random.default_rng(2).permutation(1000) < 1000 * share
    backend = make(vectors)
    for k in (1, 10, 1000):
        check_answer(backend, vectors, queries, k, mask, error)


@pytest.mark.parametrize("kind", ROUGH_KINDS)
@pytest.mark.parametrize("share", [0.9, 0.5, 0.1, 0.01, 0])
def test_a_mask_holds_for_every_kind_of_code(kind: str, share: float) -> None:
    """Scores are of codes, too rough for `check_answer`; the best 10 are among 100 candidates."""
    vectors, queries = unit(1000), unit(20, seed=1)
    mask = np.random.default_rng(2).permutation(1000) < 1000 * share
    backend = FaissBackend(filled(kind, vectors))
    _, labels = backend.search(queries, 100, backend.max_breadth, mask)
    count = min(100, mask.sum())
    assert (labels[:, count:] == -1).all()
    assert all(len(set(found.tolist())) == count for found in labels[:, :count])
    best = np.argsort(-np.where(mask, queries @ vectors.T, -2), axis=1)[:, : min(10, count)]
    found = [np.isin(*pair).sum() for pair in zip(best, labels, strict=True)]
    assert sum(found) >= 0.7 * best.size
    for breadth in (1, 3, backend.max_breadth):
        _, labels = backend.search(queries, 100, breadth, mask)
        assert mask[labels[labels >= 0]].all()


@pytest.mark.parametrize(("make", "error"), BACKENDS)
def test_duplicates_are_all_found_and_equally_good(
    make: Callable[[np.ndarray], Backend], error: float
) -> None:
    vectors = np.repeat(unit(60), 5, axis=0)
    backend = make(vectors)
    scores, labels = backend.search(unit(60), 5, backend.max_breadth)
    assert np.array_equal(np.sort(labels), np.arange(300).reshape(60, 5))
    assert (scores == scores[:, :1]).all()
    assert np.abs(scores - 1).max() <= error


@pytest.mark.parametrize(("make", "error"), BACKENDS)
def test_few_vectors_or_none_are_no_exception(
    make: Callable[[np.ndarray], Backend], error: float
) -> None:
    for count in (0, 5):
        vectors = unit(count)
        backend = make(vectors)
        check_answer(backend, vectors, unit(3, seed=1), 10, None, error)
        check_answer(backend, vectors, unit(3, seed=1), 10, np.zeros(count, dtype=bool), error)


@pytest.mark.parametrize(("make", "error"), BACKENDS)
def test_many_threads_search_at_once(make: Callable[[np.ndarray], Backend], error: float) -> None:
    vectors = unit(800)
    backend = make(vectors)

    def look(seed: int) -> None:
        mask = np.random.default_rng(seed).random(800) < 0.5 if seed % 2 else None
        for k in (3, 20):
            check_answer(backend, vectors, unit(1 + seed % 4, seed=seed), k, mask, error)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(look, range(64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_the_error_of_an_exact_backend_bounds_the_worst_vectors(
    dtype: torch.dtype, stored: type
) -> None:
    """Elements just above a power of two lose most by rounding; here all of them do."""
    random = np.random.default_rng(0)
    worst = np.where(random.random((64, 256)) < 0.5, 1, -1) * (1 + 2.0**-8 - 2.0**-12)
    vectors = (worst * 2.0**-4).astype(np.float32)
    vectors[:, -1] = 0  # of about unit length
    vectors /= np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    vectors = np.concatenate([vectors, unit(64, dim=256)]).astype(stored)
    backend = TorchBackend(vectors, dtype=dtype)
    queries = np.concatenate([vectors[:64].astype(np.float32), unit(64, dim=256)])
    scores, labels = backend.search(queries, 128, 1)
    exact = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    off = np.abs(np.take_along_axis(exact, labels, axis=1) - scores).max()
    assert off <= backend.error < 0.014
    if dtype == torch.bfloat16 and stored == np.float32:
        assert off > 0.003  # it is not far above what happens
    for k in (1, 50):
        scores, labels = backend.search(queries, k, 1)
        np.put_along_axis(left := exact.copy(), labels, -np.inf, axis=1)
        errors = backend.errors(queries, scores[:, -1])
        assert (left.max(axis=1) <= scores[:, -1] + errors).all()
        assert (errors <= backend.error).all()


def test_what_is_passed_over_is_bounded_by_what_a_query_lost_itself() -> None:
    rounded = torch.from_numpy(unit(50)).bfloat16().float().numpy()
    backend = TorchBackend(unit(100), dtype=torch.bfloat16)
    zeros = np.zeros(50, np.float32)
    lost = np.linalg.norm(rounded - unit(50), axis=1)
    more = backend.errors(unit(50), zeros) - backend.errors(rounded, zeros)
    assert more == pytest.approx(lost, rel=0.02)
    assert (backend.errors(rounded, zeros + 0.5) - backend.errors(rounded, zeros) > 0.001).all()


@pytest.mark.parametrize("at_a_time", [64, 1000, 2**24])
def test_chunks_make_no_difference(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = unit(3000), unit(4, seed=1)
    masks = [None, np.arange(3000) % 10 == 0, np.arange(3000) % 10 != 0]
    whole = TorchBackend(vectors, dtype=torch.float32)
    expected = [whole.search(queries, 12, 1, mask)[1] for mask in masks]
    monkeypatch.setitem(torch_exact._SCORES_AT_A_TIME, "cpu", at_a_time)
    monkeypatch.setattr(torch_exact, "_ROWS_AT_A_TIME", 100)
    backend = TorchBackend(vectors, dtype=torch.float32)
    for mask, labels in zip(masks, expected, strict=True):
        assert np.array_equal(backend.search(queries, 12, 1, mask)[1], labels)


def test_the_best_columns_are_found_through_groups_of_them() -> None:
    scores = torch.randn((7, 5000), generator=torch.Generator().manual_seed(0))
    for k in (1, 30, 36, 400, 5000, 6000):
        values, columns = torch_exact.top(scores, k)
        assert torch.equal(values.sort(descending=True).values, scores.topk(min(k, 5000)).values)
        assert torch.equal(scores.gather(1, columns), values)


def test_the_error_counts_what_rounding_costs_these_vectors() -> None:
    rounded = torch.from_numpy(unit(100)).bfloat16().float().numpy()
    backends = [TorchBackend(some, dtype=torch.bfloat16) for some in (rounded, unit(100))]
    cost = np.linalg.norm(rounded - unit(100), axis=1).max()
    assert backends[1].error - backends[0].error == pytest.approx(cost, rel=0.02)


def test_vectors_are_rounded_once_and_not_copied_where_they_need_not_be() -> None:
    vectors = unit(100)
    assert TorchBackend(vectors, dtype=torch.float32)._matrix.data_ptr() == vectors.ctypes.data
    halves = TorchBackend(vectors.astype(np.float16), dtype=torch.float16)
    assert halves.error < TorchBackend(vectors, dtype=torch.float16).error


# Fresh rows in memory


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "BLOCK_ROWS", 16)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("batches", [[100], [1] * 40, [15, 1, 1, 16, 17, 50]])
def test_memory_finds_what_brute_force_finds_however_it_grew(batches: list[int]) -> None:
    count = sum(batches)
    rowids, vectors = np.arange(count) * 3 + 5, unit(count)
    memory = ScanBackend(DIM)
    for start, end in zip(np.cumsum([0, *batches]), np.cumsum(batches), strict=False):
        memory = memory.append(rowids[start:end], vectors[start:end])
    assert np.array_equal(memory.rowids, rowids)
    mask = np.random.default_rng(0).random(count) < 0.3
    for k in (1, 7, count, count + 5):
        scores, labels = memory.search(unit(4, seed=1), k)
        exact = unit(4, seed=1) @ vectors.T
        order = np.argsort(-exact, axis=1)[:, :k]
        assert np.array_equal(labels, rowids[order])
        assert np.allclose(scores, np.take_along_axis(exact, order, axis=1), atol=1e-6)
        _, labels = memory.search(unit(4, seed=1), k, 1, mask)
        order = np.argsort(-np.where(mask, exact, -2), axis=1)[:, : min(k, mask.sum())]
        assert np.array_equal(labels[:, : mask.sum()], rowids[order])


@pytest.mark.usefixtures("small_blocks")
def test_memory_never_finds_what_was_removed() -> None:
    rowids, vectors = np.arange(100), unit(100)
    full = ScanBackend(DIM).append(rowids, vectors)
    memory, alive = full, np.ones(100, dtype=bool)
    for removed in ([5], [6, 7, 40, 99, 1000], list(range(16, 32)), list(range(50, 97, 2)), [49]):
        memory = memory.remove(np.array(removed[::-1]))
        alive[[row for row in removed if row < 100]] = False
        assert np.array_equal(memory.rowids, rowids[alive])
        _, labels = memory.search(unit(4, seed=1), 100)
        order = np.argsort(-(unit(4, seed=1) @ vectors[alive].T), axis=1)
        assert np.array_equal(labels, rowids[alive][order])
        wanted = memory.rowids[::-3]
        assert np.array_equal(memory.vectors_of(wanted), vectors[wanted])
    assert len(full) == 100
    assert full.search(vectors[5:6], 1)[1].tolist() == [[5]]


@pytest.mark.usefixtures("small_blocks")
def test_an_older_memory_does_not_see_what_was_appended_or_removed_later() -> None:
    old = ScanBackend(DIM).append(np.arange(10), unit(10))
    new = old.append(np.arange(10, 15), unit(5, seed=1)).remove(np.array([0, 1]))
    assert len(old) == 10
    assert sorted(old.search(unit(1), 20)[1][0].tolist()) == list(range(10))
    assert sorted(new.search(unit(1), 20)[1][0].tolist()) == list(range(2, 15))


def test_memory_is_searched_by_many_while_it_grows() -> None:
    vectors = unit(4000)
    newest = [ScanBackend(DIM).append(np.arange(100), vectors[:100])]
    done = threading.Event()

    def look(seed: int) -> None:
        queries = unit(3, seed=seed)
        while not done.is_set():
            memory = newest[0]
            count = len(memory)
            _, labels = memory.search(queries, count)
            assert np.array_equal(np.sort(labels, axis=1), np.tile(np.arange(count), (3, 1)))

    with ThreadPoolExecutor(4) as pool:
        looking = [pool.submit(look, seed) for seed in range(4)]
        try:
            for start in range(100, 4000, 30):
                rows = np.arange(start, min(start + 30, 4000))
                newest[0] = newest[0].append(rows, vectors[rows])
        finally:
            done.set()
        for one in looking:
            one.result()
    assert len(newest[0]) == 4000


@pytest.mark.usefixtures("small_blocks")
def test_memory_that_churns_stays_small() -> None:
    memory = ScanBackend(DIM).append(np.arange(20), unit(20))
    for i in range(20, 1000):
        memory = memory.append(np.array([i]), unit(1)).remove(np.array([i - 20]))
    assert len(memory) == 20
    assert len(memory._blocks) <= 8


def test_memory_keeps_half_precision_rows_as_they_are() -> None:
    vectors = unit(10).astype(np.float16)
    memory = ScanBackend(DIM).append(np.arange(10), vectors)
    assert np.array_equal(memory.vectors_of(np.arange(10)), vectors.astype(np.float32))


# Which backend, and where


def cache_of(vectors: np.ndarray, kind: str | None) -> Cache:
    info = IndexInfo("", "", "image", len(vectors), DIM, "float32", 1, 1, "", "", "", 0.0)
    index = filled(kind, vectors) if kind else None
    return Cache(info, index, vectors, np.arange(len(vectors)))


def test_an_index_without_faiss_part_is_searched_exactly() -> None:
    backend = make_backend(cache_of(unit(50), None), "cpu")
    assert isinstance(backend, TorchBackend)
    assert backend.error < 0.02
    backend = make_backend(cache_of(unit(50), "IVF4,SQ8"), "cpu")
    assert isinstance(backend, FaissBackend)
    assert (backend.max_breadth, backend.error) == (4, np.inf)


def test_an_index_that_no_gpu_takes_stays_on_the_cpu_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch_exact, "on_gpus", lambda matrix, device: None)
    monkeypatch.setattr(faiss_gpu, "num_faiss_gpus", lambda: 0)
    with caplog.at_level(logging.WARNING):
        backend = make_backend(cache_of(unit(50), "IVF4,SQ8"), "cuda")
    assert isinstance(backend, FaissBackend)
    assert "the index stays on the CPU, cuda will not take it" in caplog.text


def test_making_a_backend_repairs_batched_flat_search() -> None:
    faiss.cvar.distance_compute_blas_threshold = 128000
    FaissBackend(filled("Flat", unit(3)))
    assert faiss.cvar.distance_compute_blas_threshold == 2048


def test_a_device_that_is_not_there_is_refused() -> None:
    assert resolve_device("cpu") == "cpu"
    for name in ("tpu", "cuda:x", "cuda:", "cpu:0", ""):
        with pytest.raises(ConfigError, match="use auto, cpu, cuda"):
            resolve_device(name)
    with pytest.raises(ConfigError, match="GPUs"):
        resolve_device("cuda:99")


# The thread that searches GPUs


class SlowIndex:
    """Answers when it may; keeps what it was asked, and by which thread."""

    def __init__(self, index: Any) -> None:
        self.index = index
        self.may = threading.Event()
        self.asked: list[tuple[int, str]] = []

    def search(self, queries: np.ndarray, k: int, params: Any) -> Any:
        self.asked.append((len(queries), threading.current_thread().name))
        if not self.may.wait(10):
            raise RuntimeError("nobody let it")
        return self.index.search(queries, k, params=params)


def test_one_thread_answers_the_searches_that_wait_in_one_call() -> None:
    vectors = unit(300)
    cpu = FaissBackend(filled("Flat", vectors))
    index, dispatcher = SlowIndex(cpu.index), Dispatcher()
    backend = FaissGpuBackend(cpu, index, dispatcher)
    put = threading.Semaphore(0)
    waiting = dispatcher._waiting
    original = waiting.put

    class Counted:
        get, get_nowait = waiting.get, waiting.get_nowait

        def put(self, work: Any) -> None:
            original(work)
            put.release()

    dispatcher._waiting = Counted()  # type: ignore[assignment]
    with ThreadPoolExecutor(5) as pool:
        answers = [
            pool.submit(check_answer, backend, vectors, unit(i + 1, seed=i), 5 + i, None, CLOSE)
            for i in range(5)
        ]
        for _ in answers:
            assert put.acquire(timeout=10)
        index.may.set()
        for answer in answers:
            answer.result()
    assert sum(count for count, _ in index.asked) == 15
    assert len(index.asked) <= 2  # the first one or more, then all that came meanwhile
    assert {name for _, name in index.asked} == {"faiss-gpu"}


def test_an_error_of_a_gpu_reaches_the_caller_and_the_thread_lives_on() -> None:
    cpu = FaissBackend(filled("Flat", unit(30)))

    class Broken:
        def search(self, queries: np.ndarray, k: int, params: Any) -> Any:
            raise RuntimeError("out of memory")

    backend = FaissGpuBackend(cpu, Broken(), Dispatcher())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            backend.search(unit(1), 3, 1)


def test_what_a_gpu_cannot_do_the_cpu_does() -> None:
    vectors = unit(3000)
    cpu = FaissBackend(filled("Flat", vectors))

    class Untouchable:
        def search(self, queries: np.ndarray, k: int, params: Any) -> Any:
            raise AssertionError("the GPU was asked")

    backend = FaissGpuBackend(cpu, Untouchable(), Dispatcher())
    check_answer(backend, vectors, unit(2, seed=1), 2049, None, CLOSE)
    check_answer(backend, vectors, unit(2, seed=1), 10, np.arange(3000) % 2 == 0, CLOSE)


@pytest.mark.parametrize("kind", ["Flat", "IVF16,Flat", "IVF16,SQ8"])
@pytest.mark.gpu
@needs_faiss_gpu
def test_a_gpu_finds_what_the_cpu_finds(kind: str) -> None:
    vectors = unit(5000)
    cpu = FaissBackend(filled(kind, vectors))
    found = faiss_gpu.on_gpus(cpu, "cuda")
    assert found
    for k in (10, 3000):
        _, labels = found.search(unit(4, seed=1), k, cpu.max_breadth)
        expected = cpu.search(unit(4, seed=1), k, cpu.max_breadth)[1]
        assert (labels[:, :5] == expected[:, :5]).mean() > 0.9


def test_a_copy_that_is_no_gpu_index_is_not_taken_for_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For several GPUs FAISS answers with a CPU index where it knows of no GPU kind."""
    cpu = FaissBackend(filled("HNSW8,Flat", unit(30)))
    fake = SimpleNamespace(
        GpuMultipleClonerOptions=SimpleNamespace,
        StandardGpuResources=lambda: SimpleNamespace(setTempMemory=lambda size: None),
        index_cpu_to_gpu_multiple_py=lambda resources, index, options, gpus: index,
        GpuIndex=int,
        IndexShards=int,
        IndexShardsIVF=int,
    )
    monkeypatch.setattr(faiss_gpu, "faiss", fake)
    monkeypatch.setattr(faiss_gpu, "num_faiss_gpus", lambda: 2)
    with caplog.at_level(logging.WARNING):
        assert faiss_gpu.on_gpus(cpu, "cuda") is None
    assert "FAISS has no IndexHNSWFlat on GPUs" in caplog.text
