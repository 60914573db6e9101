import json
import logging
import resource
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest

from clipserve.errors import ConfigError, IndexStoreError
from clipserve.files import sha256
from index.build import build, read_info
from index.collection import Collection, Item, directory_lock


@pytest.fixture
def collection(tmp_path: Path) -> Iterator[Collection]:
    path = tmp_path / "pets"
    with Collection.create(path, fingerprint="a" * 64, model_name="t", embed_dim=16) as made:
        random = np.random.default_rng(0)
        vectors = random.standard_normal((40, 16))[random.integers(0, 40, 2000)]
        vectors += 0.5 * random.standard_normal((2000, 16))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        made.upsert([Item(f"{i:04d}") for i in range(2000)], vectors)
        yield made


def index_files(collection: Collection) -> list[str]:
    return sorted(file.name for file in collection.path.glob("*index-*"))


def test_a_small_collection_needs_no_index_file(collection: Collection) -> None:
    info = build(collection)
    assert (info.kind, info.count, info.size_bytes, info.file) == ("exact", 2000, 0, None)
    assert "2,000 vectors are at most 200,000" in info.reason
    assert read_info(collection.path) == info
    assert index_files(collection) == []


def test_a_large_collection_gets_lists_tuned_to_the_recall(collection: Collection) -> None:
    info = build(collection, exact_limit=1000)
    assert info.kind == "IVF128,SQ8"  # 2^round(log2(4 sqrt 2000)) = 2^round(7.48)
    assert "more than 1,000" in info.reason
    assert set(info.nprobe) == set(info.recall) == {10, 100, 1000}
    for k, recall in info.recall.items():
        assert recall >= 0.95 or info.nprobe[k] == 128
    assert info.nprobe[10] < 128
    assert f"recall@10 {info.recall[10]:.3f}" in info.reason
    file = collection.path / str(info.file)
    assert (sha256(file), file.stat().st_size) == (info.sha256, info.size_bytes)
    assert (info.generation, info.max_rowid, info.fingerprint) == (1, 2000, "a" * 64)
    assert faiss.read_index(str(file)).ntotal == 2000
    assert read_info(collection.path) == info


def test_a_higher_recall_costs_more_lists(collection: Collection) -> None:
    low = build(collection, kind="ivf", recall_target=0.5)
    high = build(collection, kind="ivf", recall_target=0.99)
    assert low.nprobe[10] < high.nprobe[10]
    assert high.recall[10] >= 0.99


def test_old_index_files_go_when_the_new_one_is_in_place(collection: Collection) -> None:
    first = build(collection, kind="IVF16,Flat")
    (collection.path / ".index-1.999.tmp").write_bytes(b"left by a killed build")
    collection.delete(["0000"])
    second = build(collection, kind="IVF16,SQ8")
    assert second.generation > first.generation
    assert second.count == 1999
    assert index_files(collection) == [second.file]
    build(collection, kind="exact")
    assert index_files(collection) == []


def test_a_kind_that_cannot_be_built_is_refused(collection: Collection) -> None:
    for kind in ("HNSW32", "IVF0,SQ8", "IVF16,PQ8", "ivf16,sq8", ""):
        with pytest.raises(ConfigError, match="use auto, exact, ivf"):
            build(collection, kind=kind)
    with pytest.raises(ConfigError, match="IVF4096,SQ8 has more lists than the 2000 vectors"):
        build(collection, kind="IVF4096,SQ8")
    assert read_info(collection.path) is None


def test_an_empty_collection_can_be_built(collection: Collection) -> None:
    collection.delete([f"{i:04d}" for i in range(2000)])
    info = build(collection)
    assert (info.kind, info.count, info.max_rowid) == ("exact", 0, 0)


def test_two_builds_at_once_are_refused(collection: Collection) -> None:
    with (
        directory_lock(collection.path, ".index.lock", wait=False),
        pytest.raises(IndexStoreError, match="being indexed by another process"),
    ):
        build(collection)
    assert build(collection).count == 2000


def test_a_full_disk_leaves_the_old_index(collection: Collection) -> None:
    old = build(collection, kind="IVF16,SQ8")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(IndexStoreError, match="the old one stays"):
            build(collection, kind="IVF16,Flat")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_info(collection.path) == old
    assert index_files(collection) == [old.file]


@pytest.mark.parametrize("damage", ["max_rowid", "truncate", "text", "list"])
def test_a_damaged_description_is_ignored_with_a_warning(
    collection: Collection, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    build(collection)
    file = collection.path / "index.json"
    text = file.read_text()
    stored = json.loads(text)
    stored["index"]["max_rowid"] += 1
    file.write_text(
        {
            "max_rowid": json.dumps(stored),
            "truncate": text[:-10],
            "text": "no JSON",
            "list": "[1]",
        }[damage]
    )
    with caplog.at_level(logging.WARNING):
        assert read_info(collection.path) is None
    assert "index.json is ignored" in caplog.text
