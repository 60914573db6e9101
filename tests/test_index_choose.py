from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest

from clipserve.errors import ConfigError
from index import choose as choose_module
from index.choose import available_memory, choose, memory_needed

GIB = 2**30


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(choose_module, "gpu_room", lambda: 0)
    threads = faiss.omp_get_max_threads()
    yield
    faiss.omp_set_num_threads(threads)


def test_few_vectors_are_compared_each() -> None:
    choice = choose("auto", 200_000, 512, memory_bytes=GIB)
    assert choice.kind == "exact"
    assert "200,000 vectors are at most 200,000" in choice.reason


def test_many_vectors_get_lists_of_what_fits() -> None:
    plenty = choose("auto", 1_000_000, 512, memory_bytes=4 * GIB)
    assert plenty.kind == "IVF4096,SQ8"
    assert "more than 200,000" in plenty.reason
    assert "of the 4.0 GiB it may take" in plenty.reason
    scarce = choose("auto", 1_000_000, 512, memory_bytes=GIB // 5)
    assert scarce.kind == "IVF4096,PQ128x4fs"
    assert "SQ8 would take 504" in scarce.reason
    assert scarce.memory_bytes <= GIB // 5 < plenty.memory_bytes
    assert choose("auto", 1_000_000, 512, memory_bytes=GIB // 14).kind == "IVF4096,PQ64x4fs"
    assert choose("auto", 1_000_000, 500, memory_bytes=GIB // 5).kind == "IVF4096,RaBitQ"


def test_a_memory_too_small_for_any_index_is_said() -> None:
    with pytest.raises(
        ConfigError, match="no index of 1000000 vectors fits into 10.0 MiB.*PQ64x4fs"
    ):
        choose("auto", 1_000_000, 512, memory_bytes=10 * 2**20)
    with pytest.raises(ConfigError, match="more than the 100.0 MiB allowed"):
        choose("IVF1024,Flat", 1_000_000, 512, memory_bytes=100 * 2**20)


def test_vectors_that_fit_on_a_gpu_are_compared_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose_module, "gpu_room", lambda: 12 * GIB)
    choice = choose("auto", 10_000_000, 512, memory_bytes=64 * GIB)
    assert choice.kind == "exact"
    assert "fit on the GPU" in choice.reason
    assert choose("auto", 20_000_000, 512, memory_bytes=64 * GIB).kind == "IVF16384,SQ8"


def test_a_kind_that_is_asked_for_is_taken() -> None:
    assert choose("exact", 10**6, 512).kind == "exact"
    assert choose("ivf", 2000, 16).kind == "IVF128,SQ8"
    assert choose("hnsw", 2000, 16).kind == "HNSW32,Flat"
    assert choose("hnsw", 10**6, 512, memory_bytes=GIB).kind == "HNSW32,SQ8"
    for kind in ("IVF16,Flat", "IVF16,RaBitQ", "IVF16,RaBitQ4", "IVF16,PQ8x4fs", "HNSW8,Flat"):
        assert choose(kind, 2000, 16).kind == kind


def test_a_kind_that_there_is_none_of_is_refused() -> None:
    for kind in ("HNSW32", "IVF0,SQ8", "IVF16,PQ8", "ivf16,sq8", "", "IVF16,RaBitQ9", "Flat"):
        with pytest.raises(ConfigError, match="use auto, exact, ivf, hnsw"):
            choose(kind, 2000, 16)
    for kind in ("IVF16,PQ6x4fs", "IVF16,PQ1x4fs"):
        with pytest.raises(ConfigError, match="must be even and divide 16"):
            choose(kind, 2000, 16)
    with pytest.raises(ConfigError, match="more lists than the 20 vectors; use kind exact"):
        choose("IVF21,SQ8", 20, 16)
    with pytest.raises(ConfigError, match="at least 2 links"):
        choose("HNSW1,SQ8", 20, 16)


@pytest.mark.parametrize(
    "kind",
    [
        "IVF16,Flat",
        "IVF16,SQfp16",
        "IVF16,SQ8",
        "IVF16,RaBitQ",
        "IVF16,RaBitQ2",
        "IVF16,RaBitQ4",
        "IVF16,PQ32x4fs",
        "HNSW16,Flat",
        "HNSW32,SQ8",
    ],
)
def test_the_memory_an_index_takes_is_foreseen(kind: str) -> None:
    faiss.omp_set_num_threads(1)
    vectors = np.random.default_rng(0).standard_normal((3000, 128)).astype(np.float32)
    index = faiss.index_factory(128, kind, faiss.METRIC_INNER_PRODUCT)
    if kind.startswith("IVF"):
        index.cp.niter, index.cp.min_points_per_centroid = 1, 1
    index.train(vectors)
    index.add(vectors)
    actual = faiss.serialize_index(index).nbytes
    assert memory_needed(kind, 3000, 128) == pytest.approx(actual, rel=0.1)


def test_an_empty_collection_has_an_index_too() -> None:
    assert choose("auto", 0, 512).kind == "exact"
    for kind in ("ivf", "hnsw", "IVF1,RaBitQ"):
        assert choose(kind, 0, 512).kind == "exact"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_what_is_free_is_what_the_machine_and_the_group_leave(tmp_path: Path) -> None:
    machine = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    8000 kB\n"}
    assert available_memory(write(tmp_path / "bare", machine)) == 8000 * 1024
    two = machine | {
        "proc/self/cgroup": "0::/app/web\n",
        "sys/fs/cgroup/app/web/memory.max": "max\n",
        "sys/fs/cgroup/app/web/memory.current": "100\n",
        "sys/fs/cgroup/app/memory.max": "5000\n",
        "sys/fs/cgroup/app/memory.current": "1000\n",
    }
    assert available_memory(write(tmp_path / "two", two)) == 4000
    one = machine | {
        "proc/self/cgroup": "3:memory:/docker/1\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "700\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "900\n",
    }
    assert available_memory(write(tmp_path / "one", one)) == 0
    assert available_memory() > 0
