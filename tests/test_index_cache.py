import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest

from clipserve.errors import IndexStoreError
from index import cache as cache_module
from index.cache import Cache, Writer, folder, read, read_info, read_queries, stamp
from index.collection import Collection, Item
from index.info import IndexInfo, Point

DIM = 8


def unit(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def collection(tmp_path: Path) -> Iterator[Collection]:
    with Collection.create(
        tmp_path / "pets", fingerprint="a" * 64, model_name="t", embed_dim=DIM
    ) as made:
        made.upsert([Item(str(i)) for i in range(50)], unit(50))
        yield made


QUERIES = unit(5, seed=9)


def put(collection: Collection, seed: int = 0, kind: str = "Flat") -> IndexInfo:
    """An index of what is in the collection, tuned with `QUERIES`."""
    with Writer(collection.path, "image", DIM, collection.dtype) as writer:
        for rowids, vectors in collection.vector_blocks():
            writer.append(rowids, vectors)
        vectors, rowids = writer.finish()
        index = faiss.index_factory(DIM, kind, faiss.METRIC_INNER_PRODUCT)
        index.add(np.asarray(vectors))
        return writer.commit(described(collection, len(rowids), f"the {seed}th"), index, QUERIES)


def described(collection: Collection, count: int, reason: str = "") -> IndexInfo:
    point: Point = {"k": 10, "breadth": 4, "fetch": 20, "recall": 0.97, "ms": 0.5}
    return IndexInfo(
        kind="Flat",
        reason=reason,
        field="image",
        count=count,
        embed_dim=DIM,
        dtype=collection.dtype.name,
        generation=collection.generation(),
        max_rowid=count,
        fingerprint=collection.fingerprint,
        identity=collection.identity,
        faiss_version="1",
        seconds=1.0,
        tuned={10: point},
        filtered={0.5: 1.0, 0.1: 4.0},
        curve=[point],
        asked={"kind": "auto", "exact_limit": 5, "memory_bytes": None},
    )


def load(collection: Collection) -> Cache | None:
    return read(collection, "image", collection.generation())


def test_what_was_written_is_read(collection: Collection) -> None:
    info = put(collection)
    found = load(collection)
    assert found
    assert found.info == info == read_info(collection.path)
    assert np.array_equal(found.rowids, collection.rowids())
    assert np.array_equal(found.vectors, unit(50))
    queries = read_queries(collection.path, info)
    assert queries is not None
    assert np.array_equal(queries, QUERIES)
    assert found.index.search(unit(1), 1)[1].tolist() == [[0]]
    assert info.size_bytes == sum(
        file.stat().st_size
        for file in folder(collection.path, "image").iterdir()
        if file.name != "index.json"
    )


def test_without_an_index_there_is_none(collection: Collection) -> None:
    assert load(collection) is None
    assert read_info(collection.path) is None
    assert stamp(collection.path, "image") is None


def test_a_new_index_changes_the_stamp(collection: Collection) -> None:
    put(collection)
    first = stamp(collection.path, "image")
    put(collection, seed=1)
    assert stamp(collection.path, "image") != first


def test_a_reader_keeps_its_files_when_new_ones_take_their_place(collection: Collection) -> None:
    put(collection)
    old = load(collection)
    assert old
    collection.upsert([Item("new")], unit(1, seed=1))
    put(collection)
    new = load(collection)
    assert new
    assert len(new.vectors) == 51
    assert np.array_equal(old.vectors, unit(50))


def test_writing_into_vectors_that_were_read_changes_no_file(collection: Collection) -> None:
    put(collection)
    found = load(collection)
    assert found
    found.vectors[:] = 0
    again = load(collection)
    assert again
    assert np.array_equal(again.vectors, unit(50))


@pytest.mark.parametrize("kind", ["faiss", "vectors", "rows", "queries"])
def test_one_flipped_bit_anywhere_is_noticed(
    collection: Collection, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = put(collection).files[kind]["name"]
    file = folder(collection.path, "image") / name
    whole = file.read_bytes()
    for place in np.linspace(0, len(whole) * 8 - 1, 25).astype(int):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        caplog.clear()
        assert load(collection) is None
        assert f"{name} is damaged" in caplog.text
    file.write_bytes(whole[:-1])
    assert load(collection) is None
    file.write_bytes(whole)
    assert load(collection)


def test_damaged_queries_are_not_tuned_with(
    collection: Collection, caplog: pytest.LogCaptureFixture
) -> None:
    info = put(collection)
    file = folder(collection.path, "image") / info.files["queries"]["name"]
    file.write_bytes(bytes(file.stat().st_size))
    assert read_queries(collection.path, info) is None
    assert f"are not used: {file.name} is damaged" in caplog.text
    file.unlink()
    assert read_queries(collection.path, info) is None


def test_a_description_from_before_it_kept_what_was_asked_is_read(collection: Collection) -> None:
    info = put(collection)
    file = folder(collection.path, "image") / "index.json"
    stored = json.loads(file.read_text())
    del stored["index"]["asked"]
    stored["sha256"] = cache_module._digest(stored["index"])
    file.write_text(json.dumps(stored))
    assert read_info(collection.path) == dataclasses.replace(info, asked=None)


def test_no_flipped_bit_in_the_description_changes_what_it_says(collection: Collection) -> None:
    info = put(collection)
    file = folder(collection.path, "image") / "index.json"
    whole = file.read_bytes()
    for place in range(0, len(whole) * 8, 61):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        file.write_bytes(damaged)
        found = read_info(collection.path)
        assert found is None or found == info


@pytest.mark.parametrize("text", ["", "no JSON", "[1]", "{}", '{"index": 1, "format_version": 2}'])
def test_a_description_that_is_none_is_ignored_with_a_warning(
    collection: Collection, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(collection)
    (folder(collection.path, "image") / "index.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert load(collection) is None
    assert "index.json is ignored" in caplog.text


def test_another_format_is_ignored(
    collection: Collection, caplog: pytest.LogCaptureFixture
) -> None:
    put(collection)
    file = folder(collection.path, "image") / "index.json"
    stored = json.loads(file.read_text())
    stored["format_version"] = 99
    file.write_text(json.dumps(stored))
    assert load(collection) is None
    assert "format 99 is not 2" in caplog.text


def test_an_index_of_another_model_or_collection_or_time_is_ignored(
    collection: Collection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    info = put(collection)
    assert read(collection, "image", info.generation - 1) is None
    assert "from a later state of it" in caplog.text
    for fingerprint, reason in (("b" * 64, "for another model"), ("a" * 64, "another collection")):
        with Collection.create(
            tmp_path / fingerprint, fingerprint=fingerprint, model_name="t", embed_dim=DIM
        ) as other:
            shutil.copytree(collection.path / "indexes", other.path / "indexes")
            caplog.clear()
            assert read(other, "image", 1) is None
            assert reason in caplog.text


def test_a_file_that_is_gone_is_said(
    collection: Collection, caplog: pytest.LogCaptureFixture
) -> None:
    name = put(collection).files["rows"]["name"]
    (folder(collection.path, "image") / name).unlink()
    assert load(collection) is None
    assert f"its file {name} is gone" in caplog.text


def test_an_index_that_is_replaced_while_it_is_read_is_read_anew(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = put(collection)
    collection.upsert([Item("new")], unit(1, seed=1))
    original, waiting = cache_module._load, [lambda: put(collection, seed=2)]

    def replaced(where: Path, info: IndexInfo) -> Cache:
        if waiting:
            waiting.pop()()
        return original(where, info)

    monkeypatch.setattr(cache_module, "_load", replaced)
    found = load(collection)
    assert found
    assert found.info.count == 51
    assert found.info != old


def test_what_is_not_committed_leaves_no_trace(collection: Collection) -> None:
    old = put(collection)
    before = sorted(folder(collection.path, "image").iterdir())
    with Writer(collection.path, "image", DIM, collection.dtype) as writer:
        writer.append(np.arange(3), unit(3))
        writer.finish()
    assert sorted(folder(collection.path, "image").iterdir()) == before
    assert read_info(collection.path) == old


def test_a_place_that_cannot_be_written_to_is_said(collection: Collection) -> None:
    (collection.path / "indexes").write_text("in the way")
    with pytest.raises(IndexStoreError, match="the index cannot be written, the old one stays"):
        put(collection)


# How far to search


def test_a_collection_that_was_dropped_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(IndexStoreError):
        Writer(tmp_path / "dropped", "image", DIM, np.dtype(np.float32))
    assert not (tmp_path / "dropped").exists()


def test_a_plan_takes_what_was_measured_and_what_lies_between(collection: Collection) -> None:
    points: dict[int, Point] = {
        k: {"k": k, "breadth": breadth, "fetch": fetch, "recall": 0.96, "ms": 1.0}
        for k, breadth, fetch in ((10, 8, 30), (100, 20, 210))
    }
    info = IndexInfo(
        **{
            **vars(described(collection, 50)),
            "tuned": points,
            "filtered": {0.5: 1.0, 0.1: 4.0, 0.03: 8.0},
        }
    )
    assert info.plan(1) == info.plan(10) == (8, 30)
    assert info.plan(100) == (20, 210)
    assert info.plan(55) == (14, 120)
    assert info.plan(1000) == (200, 2100)
    assert info.plan(10, 0.5) == (8, 30)
    assert info.plan(10, 0.1) == (32, 30)
    assert info.plan(10, 0.03) == (64, 30)
    assert 32 < info.plan(10, 0.05)[0] < 64
    assert info.plan(10, 0.003) == (640, 30)
    breadths = [info.plan(10, share)[0] for share in (1, 0.9, 0.4, 0.2, 0.05, 0.01, 1e-6, 0)]
    assert breadths == sorted(breadths)


def test_a_plan_without_measurements_is_for_an_exact_search(collection: Collection) -> None:
    info = IndexInfo(**{**vars(described(collection, 50)), "tuned": {}})
    assert info.plan(10) == (1, 36)
