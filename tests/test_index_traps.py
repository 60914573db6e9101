"""The traps of FAISS that were met before (faiss 1.15): each is shown, and what keeps us out of it.

A test that shows a trap says so in its first lines; should a later FAISS be without it, that line
fails, and the guard may go.
"""

import logging
import resource
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from clipserve.errors import IndexStoreError
from index.backends import faiss_cpu, make_backend
from index.backends.faiss_cpu import FaissBackend
from index.build import build
from index.cache import folder, read
from index.collection import Collection, Item
from index.filters import parse
from index.search import Searcher

DIM = 16
RNG = np.random.default_rng


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


def unit(count: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    vectors = RNG(seed).standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def filled(kind: str, vectors: np.ndarray) -> Any:
    index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    if kind.startswith("IVF"):
        index.cp.min_points_per_centroid = 1
    index.train(vectors)
    index.add(vectors)
    return index


@pytest.fixture
def collection(tmp_path: Path) -> Iterator[Collection]:
    with Collection.create(
        tmp_path / "pets", fingerprint="a" * 64, model_name="t", embed_dim=DIM
    ) as made:
        items = [Item(str(i), metadata={"n": i}) for i in range(3000)]
        made.upsert(items, unit(3000))
        yield made


def recall(found: np.ndarray, queries: np.ndarray, vectors: np.ndarray) -> float:
    best = np.argsort(-(queries @ vectors.T), axis=1)[:, : found.shape[1]]
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(best, found, strict=True)]))


@pytest.mark.parametrize(
    ("kind", "breadth", "trap"),
    [
        ("IVF64,Flat", 32, faiss.SearchParametersIVF),
        ("HNSW16,Flat", 400, faiss.SearchParametersHNSW),
    ],
)
def test_1_a_mask_does_not_reset_the_breadth(kind: str, breadth: int, trap: Any) -> None:
    vectors, queries = unit(5000), unit(100, seed=1)
    index, mask = filled(kind, vectors), np.ones(5000, dtype=bool)
    backend = FaissBackend(index)
    _, without = backend.search(queries, 10, breadth)
    all_of_them = faiss.IDSelectorAll()
    _, trapped = index.search(queries, 10, params=trap(sel=all_of_them))
    assert recall(trapped, queries, vectors) < recall(without, queries, vectors) - 0.05
    _, masked = backend.search(queries, 10, breadth, mask)
    assert np.array_equal(masked, without)


def test_2_no_two_searches_share_their_parameters(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAISS writes into the object while it searches through an IndexIDMap: a crash if shared."""
    kept: list[Any] = []
    original = faiss_cpu.search_parameters

    def keep(*arguments: Any) -> Any:
        kept.append(original(*arguments))
        return kept[-1]

    info = build(collection, kind="IVF16,Flat", queries=unit(20, seed=1))
    cache = read(collection, "image", info.generation)
    assert cache
    assert not isinstance(cache.index, (faiss.IndexIDMap, faiss.IndexIDMap2))
    monkeypatch.setattr(faiss_cpu, "search_parameters", keep)
    backend = make_backend(cache, "cpu")
    mask = np.arange(3000) % 2 == 0
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: backend.search(unit(3, seed=i), 5, 4, mask), range(64)))
    assert len({int(one.this) for one in kept}) == len(kept) == 64


def test_3_what_is_searched_is_never_added_to(collection: Collection) -> None:
    """Adding to a FAISS index while another thread searches it ends the process."""
    build(collection, kind="IVF16,Flat", queries=unit(20, seed=1))
    new, written, done = unit(200, seed=3), 0, threading.Event()
    with Searcher(collection.path, device="cpu") as searcher, ThreadPoolExecutor(4) as pool:
        served = served_index(searcher)
        before = faiss.serialize_index(served)

        def look(seed: int) -> None:
            while not done.is_set():
                end = written
                hits = searcher.search(np.concatenate([unit(1, seed=seed), new[:end][-1:]]), k=1)
                assert not end or hits[1][0].id == f"new {end - 1}"

        looking = [pool.submit(look, seed) for seed in range(4)]
        try:
            for start in range(0, 200, 10):
                rows = slice(start, start + 10)
                items = [Item(f"new {i}") for i in range(start, start + 10)]
                collection.upsert(items, new[rows])
                collection.delete([str(start)])
                written = start + 10
        finally:
            done.set()
        for one in looking:
            one.result()
        found = searcher.search(new, k=1)
        assert [hits[0].id for hits in found] == [f"new {i}" for i in range(200)]
        assert served_index(searcher) is served
        assert served.ntotal == 3000
        assert np.array_equal(faiss.serialize_index(served), before)


def served_index(searcher: Searcher) -> Any:
    """FAISS's, which answers now."""
    base = searcher._view.base
    assert base
    assert isinstance(base.backend, FaissBackend)
    return base.backend.index


def test_4_a_small_index_on_a_full_disk_is_an_error(tmp_path: Path) -> None:
    vectors, queries = unit(200), unit(20, seed=1)
    index = filled("IVF4,Flat", vectors)
    limit = faiss.serialize_index(index).nbytes - 100  # that FAISS's writer has yet to flush
    with Collection.create(
        tmp_path / "c", fingerprint="a" * 64, model_name="t", embed_dim=DIM
    ) as few:
        few.upsert([Item(str(i)) for i in range(200)], vectors)
        old = build(few)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            faiss.write_index(index, str(tmp_path / "cut"))  # the trap: no exception
            with pytest.raises(IndexStoreError, match="the old one stays"):
                build(few, kind="IVF4,Flat", queries=queries)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (tmp_path / "cut").stat().st_size <= limit
        cache = read(few, "image", few.generation())
        assert cache
        assert cache.info == old
        # Everything else would have had room, so it was FAISS's file that was an error.
        roomy = build(few, kind="IVF4,Flat", queries=queries)
        sizes = {file.name: file.stat().st_size for file in folder(few.path, "image").iterdir()}
        assert sizes.pop(roomy.files["faiss"]["name"]) > limit > max(sizes.values())
        assert "index.json" in sizes


def test_5_no_file_that_a_reader_has_mapped_is_written_to(collection: Collection) -> None:
    """A mapped file that is cut short under its reader ends the reader's process."""
    build(collection)
    old = read(collection, "image", collection.generation())
    assert old
    names = {file: file.stat().st_ino for file in folder(collection.path, "image").iterdir()}
    collection.delete([str(i) for i in range(2990)])
    build(collection)  # the same files, much shorter
    for file in folder(collection.path, "image").iterdir():
        assert file.stat().st_ino not in names.values()
    assert np.array_equal(old.vectors, unit(3000))


def test_6_a_flipped_bit_in_an_index_is_noticed(
    collection: Collection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    info = build(collection, kind="IVF4,Flat", queries=unit(20, seed=1))
    file = folder(collection.path, "image") / info.files["faiss"]["name"]
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 64
    file.write_bytes(damaged)
    assert faiss.read_index(str(file)).ntotal == 3000  # the trap: it loads
    with caplog.at_level(logging.WARNING):
        assert read(collection, "image", info.generation) is None
    assert "is damaged: its sha256 is not the one it was written with" in caplog.text
    file.write_bytes(file.read_bytes() + b"more")
    assert read(collection, "image", info.generation) is None


def test_7_an_item_that_is_written_again_is_there_once(collection: Collection) -> None:
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(DIM))
    for vectors in (unit(1), unit(1, seed=1)):
        index.add_with_ids(vectors, np.array([7]))
    assert index.ntotal == 2  # the trap: one id, twice
    for seed in (1, 2):
        collection.upsert([Item("7")], unit(1, seed=seed))
        build(collection)
    cache = read(collection, "image", collection.generation())
    assert cache
    assert len(cache.rowids) == len(set(cache.rowids.tolist())) == 3000
    with Searcher(collection.path, device="cpu") as searcher:
        hits = searcher.search(unit(1, seed=2), k=3000)[0]
    assert sum(hit.id == "7" for hit in hits) == 1
    assert hits[0].id == "7"


@pytest.mark.parametrize("kind", ["Flat", "HNSW16,Flat", "HNSW16,SQ8", "IVF8,SQ8"])
def test_8_what_is_deleted_is_hidden_and_no_label_moves(kind: str) -> None:
    vectors = unit(500)
    index, mask = filled(kind, vectors), np.arange(500) != 4
    backend = FaissBackend(index)
    _, labels = backend.search(vectors, 1, backend.max_breadth, mask)
    assert np.array_equal(labels[mask, 0], np.flatnonzero(mask))
    assert labels[4, 0] not in (4, -1)
    if kind.startswith("HNSW"):
        with pytest.raises(RuntimeError):
            index.remove_ids(np.array([4]))  # the trap: it cannot
    if kind == "Flat":
        index.remove_ids(np.array([4]))
        assert index.search(vectors[5:6], 1)[1].tolist() == [[4]]  # the trap: others move


@pytest.mark.parametrize("kind", ["IVF64,SQ8", "HNSW16,Flat"])
def test_9_selective_filters_do_not_starve_a_search(
    collection: Collection, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.rank.SCAN_ROWS", 20)  # so that the index is asked for most
    queries = unit(30, seed=1)
    build(collection, kind=kind, queries=unit(100, seed=2), threads=1)
    numbers = np.arange(3000)
    # The trap: with the breadth that is usual, few of those that match are found.
    _, trapped = FaissBackend(filled(kind, unit(3000))).search(queries, 10, 8, numbers < 30)
    best = np.argsort(-np.where(numbers < 30, queries @ unit(3000).T, -2), axis=1)[:, :10]
    assert np.mean([np.isin(*both).mean() for both in zip(best, trapped, strict=True)]) < 0.8
    with Searcher(collection.path, device="cpu") as searcher:
        assert searcher.info
        assert searcher.info.kind == kind
        for most in (1500, 300, 90, 30, 3):
            matching = numbers < most
            found = searcher.search(queries, k=10, filter=parse({"n": {"lt": most}}))
            assert {len(hits) for hits in found} == {min(10, most)}
            best = np.argsort(-np.where(matching, queries @ unit(3000).T, -2), axis=1)[:, :10]
            right = [
                len({hit.id for hit in hits} & set(map(str, own.tolist()))) / min(10, most)
                for hits, own in zip(found, best, strict=True)
            ]
            assert np.mean(right) >= 0.93


def test_10_what_is_not_a_number_is_refused(collection: Collection) -> None:
    broken = unit(1)
    broken[0, 3] = np.nan
    index = filled("Flat", unit(5))
    assert (index.search(broken, 1)[1] == -1).all()  # the trap: no error, no answer
    with pytest.raises(IndexStoreError, match="'bad' has length nan"):
        collection.upsert([Item("bad")], broken)
    with (
        Searcher(collection.path, device="cpu") as searcher,
        pytest.raises(IndexStoreError, match="not finite"),
    ):
        searcher.search(broken)


def test_11_faiss_is_new_enough_and_labels_are_whole(collection: Collection) -> None:
    """Before 1.15 ids of another type corrupted labels, and selectors leaked."""
    import tomllib

    root = Path(__file__).parent.parent
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert all("faiss" in extras[name][0] for name in ("cpu", "gpu", "gpu-cuvs"))
    assert all(extras[name][0].endswith(">=1.15") for name in ("cpu", "gpu", "gpu-cuvs"))
    assert tuple(map(int, faiss.__version__.split(".")[:2])) >= (1, 15)
    build(collection, kind="IVF4,Flat", queries=unit(20, seed=1))
    cache = read(collection, "image", collection.generation())
    assert cache
    assert cache.rowids.dtype == np.int64
    for source in (root / "index").rglob("*.py"):
        assert "add_sa_codes" not in source.read_text()


def test_12_inverted_lists_are_in_memory_and_read_by_many(collection: Collection) -> None:
    """Lists on disk are corrupted when one file is opened twice, or added to."""
    build(collection, kind="IVF4,Flat", queries=unit(20, seed=1))
    caches = [read(collection, "image", collection.generation()) for _ in range(2)]
    answers = []
    for cache in caches:
        assert cache
        lists = faiss.downcast_InvertedLists(cache.index.invlists)
        assert isinstance(lists, faiss.ArrayInvertedLists)
        answers.append(FaissBackend(cache.index).search(unit(5, seed=1), 10, 4)[1])
    assert np.array_equal(*answers)
