from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from index import tune
from index.info import Point
from index.tune import exact_scores, held_out, noisy_copies


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


def unit(count: int, seed: int = 0, dim: int = 16) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def filled(kind: str, vectors: np.ndarray) -> Any:
    index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    if kind.startswith("IVF"):
        index.cp.min_points_per_centroid = 1
    index.train(vectors)
    index.add(vectors)
    return index


def recall(index: Any, vectors: np.ndarray, queries: np.ndarray, point: Point) -> float:
    """By hand."""
    parameters = (
        faiss.SearchParametersIVF(nprobe=point["breadth"])
        if isinstance(index, faiss.IndexIVF)
        else faiss.SearchParametersHNSW(efSearch=point["breadth"])
    )
    _, found = index.search(queries, point["fetch"], params=parameters)
    best = np.argsort(-(queries @ vectors.T), axis=1)[:, : point["k"]]
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(best, found, strict=True)]))


@pytest.mark.parametrize("kind", ["IVF32,Flat", "IVF32,SQ8", "IVF32,RaBitQ", "HNSW8,Flat"])
def test_every_point_has_the_recall_that_was_measured(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "_TUNED_K", {10: 100, 50: 40})
    vectors, queries = unit(1000), unit(100, seed=1)
    index = filled(kind, vectors)
    tuning = tune.tune(index, vectors, queries, 0.9)
    assert set(tuning.tuned) == {10, 50}
    for point in tuning.curve:
        asked = queries[: {10: 100, 50: 40}[point["k"]]]
        assert point["recall"] == pytest.approx(recall(index, vectors, asked, point), abs=0.002)
        assert point["ms"] > 0
    for k, point in tuning.tuned.items():
        enough = [p for p in tuning.curve if p["k"] == k and p["recall"] >= 0.9]
        assert point == min(enough, key=lambda p: p["ms"])


def test_coarse_codes_take_more_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_TUNED_K", {10: 100})
    vectors, queries = unit(2000), unit(100, seed=1)
    fetches = {}
    for kind in ("IVF8,Flat", "IVF8,RaBitQ"):
        point = tune.tune(filled(kind, vectors), vectors, queries, 0.95).tuned[10]
        assert point["recall"] >= 0.95
        fetches[kind] = point["fetch"]
    assert fetches["IVF8,RaBitQ"] > fetches["IVF8,Flat"] == 16


def test_a_breadth_between_the_powers_of_two_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_TUNED_K", {10: 200})
    vectors = unit(2000)
    tuning = tune.tune(filled("IVF64,Flat", vectors), vectors, unit(200, seed=1), 0.9)
    breadths = {point["breadth"] for point in tuning.curve}
    assert any(breadth & (breadth - 1) for breadth in breadths)
    least = min(p["breadth"] for p in tuning.curve if p["recall"] >= 0.9)
    assert least & (least - 1)


def test_a_target_out_of_reach_gives_the_best_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_TUNED_K", {10: 100})
    vectors = unit(2000)
    tuning = tune.tune(filled("HNSW2,Flat", vectors), vectors, unit(100, seed=1), 1.0)
    assert tuning.tuned[10]["recall"] == max(point["recall"] for point in tuning.curve) < 1


@pytest.mark.parametrize("kind", ["IVF32,Flat", "HNSW16,Flat"])
def test_the_breadth_a_filter_takes_keeps_the_recall(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "_TUNED_K", {10: 128})
    vectors, queries = unit(4000), unit(128, seed=1)
    index = filled(kind, vectors)
    tuning = tune.tune(index, vectors, queries, 0.9)
    assert set(tuning.filtered) == {0.5, 0.1, 0.03}
    assert tuning.filtered[0.03] >= tuning.filtered[0.5] >= 1
    mask = np.random.default_rng(5).random(4000) < 0.1
    point = tuning.tuned[10]
    breadth = int(point["breadth"] * tuning.filtered[0.1])
    _, found = tune.FaissBackend(index).search(queries, point["fetch"], breadth, mask)
    best = np.argsort(-np.where(mask, queries @ vectors.T, -2), axis=1)[:, :10]
    kept = np.mean([np.isin(a, b).mean() for a, b in zip(best, found, strict=True)])
    assert kept >= 0.87  # another mask than it was measured with


def test_the_breadth_a_filter_takes_is_told_finer_than_by_doubling() -> None:
    vectors, queries = unit(4000), unit(64, seed=1)
    mask = np.random.default_rng(5).random(4000) < 0.1
    backend = tune.FaissBackend(filled("IVF64,Flat", vectors))
    (best,) = exact_scores(vectors, queries, 10, [mask])
    measure = tune._Measure(backend, vectors, queries, best[:, -1], mask)
    point: Point = {"k": 10, "breadth": 4, "fetch": 16, "recall": 0.9, "ms": 1.0}
    factor = measure.multiple(point, 0.9) / tune._SPARE
    assert factor not in (1, 2, 4, 8, 16)
    assert measure.recalls(10, int(np.ceil(4 * factor)), [16])[0] >= 0.9
    assert measure.recalls(10, int(3 * factor), [16])[0] < 0.9


def test_equal_vectors_are_equally_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the many equally good ones an index finds is no miss."""
    monkeypatch.setattr(tune, "_TUNED_K", {10: 50})
    vectors = np.repeat(unit(50), 40, axis=0)
    tuning = tune.tune(filled("IVF4,SQ8", vectors), vectors, unit(50, seed=1), 0.95)
    assert tuning.tuned[10]["recall"] >= 0.95
    assert tuning.tuned[10]["fetch"] < 50


def test_fewer_vectors_than_are_usually_looked_for() -> None:
    vectors = unit(5)
    tuning = tune.tune(filled("IVF1,SQ8", vectors), vectors, unit(20, seed=1), 0.95)
    assert list(tuning.tuned) == [5]
    assert tuning.tuned[5]["recall"] == 1


def test_the_best_scores_are_found_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_ROWS_AT_A_TIME", 64)
    vectors, queries = unit(500).astype(np.float16), unit(7, seed=1)
    mask = np.arange(500) % 100 == 3
    every, few = exact_scores(vectors, queries, 20, [None, mask])
    scores = queries @ vectors.astype(np.float32).T
    assert np.allclose(every, -np.sort(-scores, axis=1)[:, :20], atol=1e-6)
    assert np.allclose(few[:, :5], -np.sort(-scores[:, mask], axis=1), atol=1e-6)
    assert (few[:, 5:] == -np.inf).all()


def test_a_mapped_file_that_was_gone_through_takes_no_memory(tmp_path: Path) -> None:
    file = tmp_path / "mapped"
    unit(60000).tofile(file)  # 3.7 MB
    vectors = np.memmap(file, np.float32, "c", shape=(60000, 16))
    assert sum(len(block) for _, block in tune.blocks(vectors)) == 60000
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith(str(file)))
    resident = next(line for line in lines[start:] if line.startswith("Rss:"))
    assert int(resident.split()[1]) < 100  # kB
    assert np.array_equal(vectors[:3], unit(60000)[:3])


def test_stored_vectors_are_no_queries() -> None:
    vectors = unit(200, dim=64)
    others = unit(5, dim=64, seed=1)
    again = vectors[[3, 7]].astype(np.float16).astype(np.float32)
    queries = np.concatenate([others[:2], again, others[2:]])
    assert np.array_equal(held_out(queries, vectors), others)


def test_noisy_copies_are_off_their_vectors() -> None:
    vectors = unit(200, dim=256)
    copies = noisy_copies(vectors, np.random.default_rng(0))
    assert np.allclose(np.linalg.norm(copies, axis=1), 1, atol=1e-5)
    assert np.allclose((copies * vectors).sum(axis=1), 0.7, atol=0.1)
