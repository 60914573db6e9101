import functools
import logging
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from clipserve.errors import ConfigError, IndexStoreError
from clipserve.files import sha256
from index import build as build_module
from index import tune
from index.backends.faiss_cpu import FaissBackend
from index.build import read_info
from index.cache import folder, read, read_queries
from index.collection import Collection, Item, directory_lock
from index.filters import parse
from index.info import IndexInfo
from index.search import Searcher

build = functools.partial(build_module.build, threads=1)
rebuild = functools.partial(build_module.rebuild, threads=1)


@pytest.fixture(autouse=True)
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_TUNED_K", {10: 300, 100: 50})
    monkeypatch.setattr(tune, "_MOST_TIMED", 8)


def clustered(count: int, seed: int = 0, dim: int = 16) -> np.ndarray:
    random = np.random.default_rng(seed)
    vectors = np.random.default_rng(0).standard_normal((40, dim))[random.integers(0, 40, count)]
    vectors += 0.5 * random.standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def collection(tmp_path: Path) -> Iterator[Collection]:
    path = tmp_path / "pets"
    with Collection.create(path, fingerprint="a" * 64, model_name="t", embed_dim=16) as made:
        made.upsert([Item(f"{i:04d}") for i in range(2000)], clustered(2000))
        yield made


def files(collection: Collection, field: str = "image") -> list[str]:
    return sorted(file.name for file in folder(collection.path, field).iterdir())


def names(info: IndexInfo) -> list[str]:
    return sorted([file["name"] for file in info.files.values()] + ["index.json"])


def test_a_small_collection_is_scanned_and_its_vectors_stand_in_a_file(
    collection: Collection,
) -> None:
    info = build(collection)
    assert (info.kind, info.count, info.tuned) == ("exact", 2000, {})
    assert "2,000 vectors are at most 200,000" in info.reason
    assert set(info.files) == {"vectors", "rows"}
    assert read_info(collection.path) == info
    assert files(collection) == names(info)
    cache = read(collection, "image", info.generation)
    assert cache
    assert cache.index is None
    assert np.array_equal(cache.rowids, collection.rowids())
    assert np.array_equal(cache.vectors, collection.vectors_of(cache.rowids))


def test_a_large_collection_gets_lists_tuned_to_the_recall(collection: Collection) -> None:
    info = build(collection, exact_limit=1000)
    assert info.kind == "IVF128,SQ8"  # 2^round(log2(4 sqrt 2000)) = 2^round(7.48)
    assert "more than 1,000" in info.reason
    assert set(info.tuned) == {10, 100}
    for k, point in info.tuned.items():
        assert point["k"] == k
        assert point["recall"] >= 0.95
        assert point in info.curve
    assert info.tuned[10]["breadth"] < 128
    assert f"recall@10 {info.tuned[10]['recall']:.3f}" in info.reason
    assert "noisy copies of stored vectors" in info.reason
    assert set(info.filtered) == {0.5, 0.1, 0.03}
    assert (info.generation, info.max_rowid, info.fingerprint) == (1, 2000, "a" * 64)
    assert info.memory_bytes == info.files["faiss"]["size"]
    for file in info.files.values():
        path = folder(collection.path, "image") / file["name"]
        assert (sha256(path), path.stat().st_size) == (file["sha256"], file["size"])
    assert read_info(collection.path) == info
    cache = read(collection, "image", info.generation)
    assert cache
    assert cache.index.ntotal == 2000


def test_a_higher_recall_costs_more(collection: Collection) -> None:
    low = build(collection, kind="ivf", recall_target=0.5)
    high = build(collection, kind="ivf", recall_target=0.99)
    assert low.tuned[10]["breadth"] < high.tuned[10]["breadth"]
    assert high.tuned[10]["recall"] >= 0.99


@pytest.mark.parametrize(
    "kind",
    [
        "IVF16,Flat",
        "IVF16,SQfp16",
        "IVF16,SQ8",
        "IVF16,RaBitQ",
        "IVF16,RaBitQ4",
        "IVF16,PQ8x4fs",
        "HNSW8,Flat",
        "HNSW8,SQ8",
    ],
)
def test_every_kind_finds_what_it_says_it_finds(collection: Collection, kind: str) -> None:
    queries = clustered(300, seed=1)
    info = build(collection, kind=kind, queries=queries)
    assert info.kind == kind
    assert info.queries == "300 given queries"
    cache = read(collection, "image", info.generation)
    assert cache
    breadth, fetch = info.plan(10)
    backend = FaissBackend(cache.index)
    _, labels = backend.search(queries, fetch, breadth)
    best = np.argsort(-(queries @ cache.vectors.T), axis=1)[:, :10]
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(best, labels, strict=True)])
    assert recall == pytest.approx(info.tuned[10]["recall"], abs=0.002)
    assert recall >= 0.95 or "out of reach" in info.reason


@pytest.mark.parametrize(
    "kind",
    ["IVF16,SQ8", "IVF16,PQ8x4fs", "IVF16,PQ4x4fs", "IVF16,RaBitQ", "HNSW32,Flat", "HNSW32,SQ8"],
)
def test_no_kind_finds_what_is_deleted_or_filtered_out(
    collection: Collection, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.rank.SCAN_ROWS", 0)  # so that the index is asked
    vectors, queries = clustered(2000), clustered(50, seed=1)
    numbers = np.arange(2000)
    items = [Item(f"{n:04d}", metadata={"n": n % 10}) for n in numbers.tolist()]
    collection.upsert(items, vectors)
    build(collection, kind=kind, queries=clustered(300, seed=2))
    for dead in (numbers < 40, numbers % 4 == 0):  # the first are met, the others masked
        collection.delete([items[n].id for n in np.flatnonzero(dead)])
        with Searcher(collection.path, device="cpu") as searcher:
            assert searcher.info
            assert searcher.info.kind == kind
            for most in (10, 5, 1):
                allowed = (numbers >= 40) & ~dead & (numbers % 10 < most)
                filter = parse({"n": {"lt": most}}) if most < 10 else None
                answers = searcher.search(queries, filter=filter)
                found = np.array([[int(hit.id) for hit in hits] for hits in answers])
                assert found.shape == (50, 10)
                assert allowed[found].all()
                exact = np.argsort(-np.where(allowed, queries @ vectors.T, -2), axis=1)[:, :10]
                pairs = zip(exact, found, strict=True)
                assert np.mean([np.isin(*pair).mean() for pair in pairs]) >= 0.9


def test_a_target_that_is_out_of_reach_is_said(
    collection: Collection, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        info = build(collection, kind="HNSW2,SQ8", recall_target=1.0)
    assert info.tuned[10]["recall"] < 1
    assert "the target is out of reach" in info.reason
    assert "out of reach" in caplog.text


def test_it_is_tuned_with_the_texts_of_the_collection(tmp_path: Path) -> None:
    with Collection.create(
        tmp_path / "c", fingerprint="a" * 64, model_name="t", embed_dim=16, dtype="float16"
    ) as made:
        items = [Item(str(i)) for i in range(500)]
        made.upsert(items, clustered(500), text_vectors=clustered(500, seed=1))
        info = build(made, kind="IVF8,SQ8")
        assert info.queries == "500 text vectors of the collection"
        assert info.dtype == "float16"
        cache = read(made, "image", info.generation)
        assert cache
        assert cache.vectors.dtype == np.float16
        info = build(made, kind="IVF8,SQ8", field="text")
        assert info.queries == "256 noisy copies of stored vectors"
        assert read_info(made.path, "text") == info
        assert read_info(made.path, "image") != info


def test_it_is_not_tuned_with_what_is_stored(tmp_path: Path) -> None:
    """A caption that is embedded again, or that stands for its picture, would find itself."""
    stored, others = clustered(500), clustered(40, seed=2)
    with Collection.create(
        tmp_path / "c", fingerprint="a" * 64, model_name="t", embed_dim=16
    ) as made:
        made.upsert([Item(str(i)) for i in range(500)], stored, text_vectors=stored)
        noisy = "256 noisy copies of stored vectors"
        assert build(made, kind="IVF8,SQ8").queries == noisy
        assert build(made, kind="IVF8,SQ8", queries=stored[:100], field="text").queries == noisy
        mixed = np.concatenate([stored[:60], others])
        info = build(made, kind="IVF8,SQ8", queries=mixed)
        assert info.queries == "40 of 100 given queries, which are no stored vectors"
        assert rebuild(made).queries == info.queries


def test_a_rebuild_decides_as_it_was_asked_to(collection: Collection) -> None:
    queries = clustered(300, seed=1)
    first = build(collection, exact_limit=1000, queries=queries, recall_target=0.9)
    assert first.asked == {"kind": "auto", "exact_limit": 1000, "memory_bytes": None}
    again = rebuild(collection)
    assert (again.kind, again.recall_target) == (first.kind, 0.9)
    assert (again.queries, again.asked) == (first.queries, first.asked)
    assert again.files["queries"]["sha256"] == first.files["queries"]["sha256"]
    collection.delete([f"{i:04d}" for i in range(1200)])
    fewer = rebuild(collection)
    assert (fewer.kind, fewer.count) == ("exact", 800)  # what was asked is "auto"
    assert read_queries(collection.path, fewer) is not None  # for when it is large again
    assert files(collection) == names(fewer)


def test_a_rebuild_stays_within_the_memory_that_was_allowed(collection: Collection) -> None:
    small = build(collection, exact_limit=1000, memory_bytes=48_000)
    assert small.kind == "IVF128,PQ4x4fs"
    assert rebuild(collection).kind == small.kind
    assert rebuild(collection, memory_bytes=10**7).kind == "IVF128,SQ8"


def test_a_build_decides_anew_whatever_was_asked_before(collection: Collection) -> None:
    build(collection, kind="IVF16,Flat", queries=clustered(300, seed=1), recall_target=0.9)
    info = build(collection)
    assert (info.kind, info.recall_target) == ("exact", 0.95)
    assert "queries" not in info.files
    assert files(collection) == names(info)


def test_a_rebuild_of_what_was_never_built_or_of_another_model_is_a_build(
    collection: Collection,
) -> None:
    assert rebuild(collection).kind == "exact"
    file = folder(collection.path, "image") / "index.json"
    build(collection, kind="IVF16,Flat", queries=clustered(300, seed=1))
    collection.close()
    text = file.read_text()
    with Collection.create(
        collection.path.parent / "other", fingerprint="b" * 64, model_name="t", embed_dim=16
    ) as other:
        other.upsert([Item("a")], clustered(1))
        folder(other.path, "image").mkdir(parents=True)
        (folder(other.path, "image") / "index.json").write_text(text)
        info = rebuild(other)
    assert (info.kind, set(info.files)) == ("exact", {"vectors", "rows"})


def test_a_rebuild_asks_as_the_index_in_place_when_it_has_the_lock(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(collection, kind="exact")
    original = build_module.directory_lock

    def overtaken(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(build_module, "directory_lock", original)
        build(collection, kind="IVF16,Flat")
        return original(*arguments, **options)

    monkeypatch.setattr(build_module, "directory_lock", overtaken)
    assert rebuild(collection).kind == "IVF16,Flat"


def test_old_files_go_when_the_new_ones_are_in_place(collection: Collection) -> None:
    first = build(collection, kind="IVF16,Flat")
    (folder(collection.path, "image") / ".faiss.999.tmp").write_bytes(b"left by a killed build")
    collection.delete(["0000"])
    second = build(collection, kind="IVF16,SQ8")
    assert second.generation > first.generation
    assert second.count == 1999
    assert files(collection) == names(second)
    third = build(collection, kind="exact")
    assert files(collection) == names(third)


def test_a_kind_that_cannot_be_built_is_refused(collection: Collection) -> None:
    with pytest.raises(ConfigError, match="use auto, exact, ivf"):
        build(collection, kind="IVF16,OPQ8")
    with pytest.raises(ConfigError, match="IVF4096,SQ8 has more lists than the 2000 vectors"):
        build(collection, kind="IVF4096,SQ8")
    collection.delete([f"{i:04d}" for i in range(5, 2000)])
    with pytest.raises(ConfigError, match="IVF1,PQ8x4fs cannot be trained on 5 vectors"):
        build(collection, kind="IVF1,PQ8x4fs")
    assert read_info(collection.path) is None


def test_queries_that_cannot_be_used_are_refused(collection: Collection) -> None:
    for queries in (np.zeros((0, 16)), clustered(3, dim=8), clustered(3)[0]):
        with pytest.raises(ConfigError, match=r"must be \(number, 16\)"):
            build(collection, queries=queries)
    for value in (0.0, np.nan):
        with pytest.raises(ConfigError, match="zero or not finite"):
            build(collection, queries=np.full((3, 16), value))


def test_an_empty_collection_can_be_built(collection: Collection) -> None:
    collection.delete([f"{i:04d}" for i in range(2000)])
    info = build(collection)
    assert (info.kind, info.count, info.max_rowid) == ("exact", 0, 0)
    cache = read(collection, "image", info.generation)
    assert cache
    assert cache.vectors.shape == (0, 16)


def test_two_builds_at_once_are_refused(collection: Collection) -> None:
    with (
        directory_lock(collection.path, ".index.lock", wait=False),
        pytest.raises(IndexStoreError, match="being indexed by another process"),
    ):
        build(collection)
    assert build(collection).count == 2000


@pytest.mark.parametrize("limit", [10_000, 130_000])
def test_a_full_disk_leaves_the_old_index(collection: Collection, limit: int) -> None:
    old = build(collection, kind="IVF16,SQ8")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(IndexStoreError, match="the old one stays"):
            build(collection, kind="IVF16,Flat")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_info(collection.path) == old
    assert files(collection) == names(old)


def test_the_module_is_imported_without_torch() -> None:
    code = "import sys, index.build; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_writes_go_on_while_an_index_is_built(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = build_module.tune

    def tune_while_written(*arguments: object) -> object:
        collection.upsert([Item("new")], clustered(1, seed=5))
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(build_module, "tune", tune_while_written)
    info = build(collection, kind="IVF16,SQ8")
    assert (info.count, info.generation, collection.generation()) == (2000, 1, 2)


def test_the_vectors_are_never_in_memory_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.collection.BLOCK_ROWS", 512)
    monkeypatch.setattr(tune, "_ROWS_AT_A_TIME", 512)
    monkeypatch.setattr(tune, "_CANDIDATES", 4096)
    monkeypatch.setattr(tune, "_TUNED_K", {10: 64})
    monkeypatch.setattr(build_module, "_LEAST_TRAINING", 800)
    vectors = clustered(16000, dim=64)  # 4 MB
    with Collection.create(
        tmp_path / "c", fingerprint="a" * 64, model_name="t", embed_dim=64
    ) as made:
        for start in range(0, 16000, 2000):
            items = [Item(str(i)) for i in range(start, start + 2000)]
            made.upsert(items, vectors[start : start + 2000])
        queries = clustered(64, seed=1, dim=64)
        tracemalloc.start()
        try:
            build(made, kind="IVF16,SQ8", queries=queries)
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert most < vectors.nbytes / 2


def test_the_number_of_threads_is_given_back(collection: Collection) -> None:
    before = faiss.omp_get_max_threads()
    build_module.build(collection, kind="IVF16,SQ8", threads=before + 1)
    assert faiss.omp_get_max_threads() == before
