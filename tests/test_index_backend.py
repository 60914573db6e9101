import faiss
import numpy as np
import pytest

from clipserve.errors import ConfigError
from index import backend
from index.backend import MemoryBackend, exact_index, make_backend, resolve_device


def unit(count: int, seed: int = 0, dim: int = 8) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def brute_force(
    queries: np.ndarray, rowids: np.ndarray, vectors: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    scores = queries @ vectors.T
    order = np.argsort(-scores, axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), rowids[order]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "BLOCK_ROWS", 16)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("batches", [[100], [1] * 40, [15, 1, 1, 16, 17, 50]])
def test_memory_finds_what_brute_force_finds_however_it_grew(batches: list[int]) -> None:
    count = sum(batches)
    rowids, vectors = np.arange(count) * 3 + 5, unit(count)
    memory = MemoryBackend(8)
    for start, end in zip(np.cumsum([0, *batches]), np.cumsum(batches), strict=False):
        memory = memory.append(rowids[start:end], vectors[start:end])
    assert len(memory) == count
    for k in (1, 7, count, count + 5):
        scores, labels = memory.search(unit(4, seed=1), k)
        expected = brute_force(unit(4, seed=1), rowids, vectors, k)
        assert np.allclose(scores, expected[0], atol=1e-6)
        assert np.array_equal(labels, expected[1])


@pytest.mark.usefixtures("small_blocks")
def test_memory_never_finds_what_was_removed() -> None:
    rowids, vectors = np.arange(100), unit(100)
    full = MemoryBackend(8).append(rowids, vectors)
    memory, alive = full, np.ones(100, dtype=bool)
    for removed in ([5], [6, 7, 40, 99, 1000], list(range(16, 32)), list(range(50, 97, 2)), [49]):
        memory = memory.remove(np.array(removed[::-1]))
        alive[[row for row in removed if row < 100]] = False
        assert len(memory) == alive.sum()
        scores, labels = memory.search(unit(4, seed=1), 100)
        expected = brute_force(unit(4, seed=1), rowids[alive], vectors[alive], 100)
        assert np.allclose(scores, expected[0], atol=1e-6)
        assert np.array_equal(labels, expected[1])
    assert len(full) == 100
    assert full.search(vectors[5:6], 1)[1].tolist() == [[5]]


@pytest.mark.usefixtures("small_blocks")
def test_an_older_memory_does_not_see_what_was_appended_or_removed_later() -> None:
    old = MemoryBackend(8).append(np.arange(10), unit(10))
    new = old.append(np.arange(10, 15), unit(5, seed=1)).remove(np.array([0, 1]))
    assert len(old) == 10
    assert sorted(old.search(unit(1), 20)[1][0].tolist()) == list(range(10))
    assert sorted(new.search(unit(1), 20)[1][0].tolist()) == list(range(2, 15))


@pytest.mark.usefixtures("small_blocks")
def test_memory_that_churns_stays_small() -> None:
    memory = MemoryBackend(8).append(np.arange(20), unit(20))
    for i in range(20, 1000):
        memory = memory.append(np.array([i]), unit(1)).remove(np.array([i - 20]))
    assert len(memory) == 20
    assert len(memory._blocks) <= 8


def test_an_empty_memory_finds_nothing() -> None:
    scores, labels = MemoryBackend(8).search(unit(3), 5)
    assert scores.shape == labels.shape == (3, 0)


def test_an_exact_faiss_index_answers_with_row_numbers() -> None:
    rowids, vectors = np.arange(500) * 2 + 1, unit(500)
    index = exact_index(8, [(rowids[:300], vectors[:300]), (rowids[300:], vectors[300:])])
    found = make_backend(index, {}, "cpu").search(unit(4, seed=1), 10, 1)
    expected = brute_force(unit(4, seed=1), rowids, vectors, 10)
    assert np.allclose(found[0], expected[0], atol=1e-6)
    assert np.array_equal(found[1], expected[1])


def test_every_faiss_search_says_how_many_lists_to_probe() -> None:
    vectors = unit(2000)
    index = faiss.index_factory(8, "IVF32,Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.train(vectors)
    index.add_with_ids(vectors, np.arange(2000))
    ivf = make_backend(index, {10: 2, 100: 8}, "cpu")
    assert [ivf.breadth(k) for k in (1, 10, 11, 100, 101)] == [2, 2, 8, 8, 32]
    expected = brute_force(unit(50, seed=1), np.arange(2000), vectors, 10)[1]

    def recall(breadth: int) -> float:
        found = ivf.search(unit(50, seed=1), 10, breadth)[1]
        return float(np.mean([np.isin(a, b).mean() for a, b in zip(expected, found, strict=True)]))

    assert recall(32) == 1
    assert recall(1) < recall(4) <= 1


def test_making_a_backend_repairs_batched_flat_search() -> None:
    faiss.cvar.distance_compute_blas_threshold = 128000
    make_backend(exact_index(8, []), {}, "cpu")
    assert faiss.cvar.distance_compute_blas_threshold == 20


def test_a_device_that_is_not_there_is_refused() -> None:
    assert resolve_device("cpu") == "cpu"
    for name in ("tpu", "cuda:x", "cpu:0", ""):
        with pytest.raises(ConfigError, match="use auto, cpu, cuda"):
            resolve_device(name)
    with pytest.raises(ConfigError, match="GPUs"):
        resolve_device("cuda:99")


def has_gpu() -> bool:
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="FAISS sees no GPU")
def test_a_gpu_finds_what_the_cpu_finds() -> None:
    rowids, vectors = np.arange(5000), unit(5000, dim=32)
    gpu = make_backend(exact_index(32, [(rowids, vectors)]), {}, resolve_device("cuda"))
    assert isinstance(gpu, backend.GpuBackend)
    for k in (10, 3000):
        scores, labels = gpu.search(unit(4, seed=1, dim=32), k, 1)
        expected = brute_force(unit(4, seed=1, dim=32), rowids, vectors, k)
        assert np.allclose(scores, expected[0], atol=1e-3)
        assert (labels[:, :5] == expected[1][:, :5]).mean() > 0.9
