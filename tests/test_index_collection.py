import contextlib
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipserve.errors import IndexStoreError, ItemTooLarge
from index.check import check
from index.collection import DATABASE, Collection, Item, Unit
from index.sqlite import transaction

ROOT = Path(__file__).resolve().parent.parent
MODEL = {"fingerprint": "a" * 64, "model_name": "tiny", "embed_dim": 8}


@pytest.fixture
def collection(tmp_path: Path) -> Iterator[Collection]:
    with Collection.create(tmp_path / "pets", **MODEL) as made:
        yield made


def unit(count: int, seed: int = 0, dim: int = 8) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def nested(depth: int) -> Any:
    """Objects and lists in turn."""
    value: Any = 1
    for level in range(depth):
        value = {"a": value} if level % 2 else [value, "["]
    return value


def test_items_come_back_as_they_were_put(collection: Collection) -> None:
    items = [
        Item("cat/1", "a cat", "cats.csv row 2", {"tags": ["a", 1, None], "nested": {"x": 0.5}}),
        Item("\u732b \U0001f431", "\u00e9\u00e8", "", {"x": nested(63), "many": [[]] * 100}),
    ]
    vectors = unit(2)
    collection.upsert(items, vectors, [b"jpeg", None])
    assert collection.get(["cat/1", "\u732b \U0001f431", "none"]) == {i.id: i for i in items}
    assert collection.count() == 2
    assert collection.thumbnail("cat/1") == b"jpeg"
    assert collection.thumbnail("\u732b \U0001f431") is None
    assert collection.contains(["none", "cat/1"]) == {"cat/1"}
    assert np.array_equal(collection.vectors_of(collection.rowids()), vectors)


def test_what_was_written_is_there_after_opening_again(tmp_path: Path) -> None:
    with Collection.create(tmp_path / "pets", **MODEL) as collection:
        collection.upsert([Item("a"), Item("b")], unit(2))
        collection.delete(["a"])
    with Collection.open(tmp_path / "pets", read_only=True) as again:
        assert [item.id for item in again.scan()] == ["b"]
        assert (again.name, again.fingerprint, again.model_name, again.embed_dim) == (
            "pets",
            "a" * 64,
            "tiny",
            8,
        )
        assert again.generation() == 2
        with pytest.raises(IndexStoreError, match="read-only"):
            again.delete(["b"])


def test_an_upsert_that_keeps_leaves_an_item_what_it_does_not_bring(collection: Collection) -> None:
    image, text = unit(2), unit(3, seed=1)
    collection.upsert([Item("a"), Item("b")], image, [b"jpeg", None])
    collection.upsert([Item(id, "new") for id in "bac"], None, text_vectors=text, keep=True)
    rows = collection.rowids_of("abc")
    assert collection.rowids().tolist() == sorted([rows["a"], rows["b"]])
    assert np.array_equal(collection.vectors_of(np.array([rows["a"], rows["b"]])), image)
    every = np.array([rows[id] for id in "bac"])
    assert np.array_equal(collection.vectors_of(every, "text"), text)
    assert collection.thumbnail("a") == b"jpeg"
    assert collection.get("a")["a"].caption == "new"
    collection.upsert([Item("a")], unit(1, seed=2), [b"other"], keep=True)
    assert collection.thumbnail("a") == b"other"
    assert len(collection.rowids("text")) == 3
    assert check(collection.path).problems == []


def test_an_upsert_replaces_everything_of_the_item_under_a_new_row(collection: Collection) -> None:
    collection.upsert([Item("a", "old"), Item("b")], unit(2), [b"old", b"b"])
    old = collection.rowids()
    collection.upsert([Item("a", "new")], unit(1, seed=1))
    assert collection.count() == 2
    assert collection.get(["a"])["a"].caption == "new"
    assert collection.thumbnail("a") is None
    assert collection.rowids().tolist() == [old[1], old[1] + 1]
    assert collection.deleted_since(1).tolist() == [old[0]]


def test_a_row_number_is_never_used_twice(collection: Collection) -> None:
    collection.upsert([Item("a"), Item("b")], unit(2))
    highest = collection.rowids().max()
    collection.delete(["a", "b"])
    collection.upsert([Item("a")], unit(1))
    assert collection.rowids().tolist() == [highest + 1]


def test_delete_counts_what_was_there(collection: Collection) -> None:
    collection.upsert([Item("a"), Item("b"), Item("c")], unit(3), [b"1", b"2", b"3"])
    assert collection.delete(["a", "a", "none", "c"]) == 2
    assert collection.count() == 1
    assert collection.thumbnail("a") is None
    assert len(collection.rowids()) == 1


def test_scan_pages_through_all_ids_in_order(collection: Collection) -> None:
    ids = [f"{i:03d}" for i in range(25)]
    collection.upsert([Item(id) for id in reversed(ids)], unit(25))
    seen: list[str] = []
    while page := collection.scan(start_after=seen[-1] if seen else "", limit=10):
        seen += [item.id for item in page]
    assert seen == ids
    with pytest.raises(IndexStoreError, match="limit 0"):
        collection.scan(limit=0)


def test_many_ids_are_looked_up_at_once(collection: Collection) -> None:
    ids = [f"{i}" for i in range(1234)]
    collection.upsert([Item(id) for id in ids], unit(1234))
    assert collection.contains([*ids, "x"]) == set(ids)
    assert collection.delete(ids) == 1234


def test_vectors_are_read_in_the_order_asked_for(collection: Collection) -> None:
    vectors = unit(5)
    collection.upsert([Item(f"{i}") for i in range(5)], vectors)
    rowids = collection.rowids()[[3, 0, 3, 4]]
    assert np.array_equal(collection.vectors_of(rowids), vectors[[3, 0, 3, 4]])


def test_what_is_written_together_is_one_write(collection: Collection) -> None:
    before = collection.generation()
    with collection.together():
        collection.upsert([Item("a"), Item("b")], unit(2))
        collection.upsert([Item("c")], unit(1), text_vectors=unit(1, seed=1))
        collection.delete(["a"])
    assert [item.id for item in collection.scan()] == ["b", "c"]
    assert collection.count() == 2
    assert collection.generation() == before + 1

    def write_half() -> None:
        with collection.together():
            collection.upsert([Item("d")], unit(1))
            collection.upsert([Item("e")], np.zeros((1, 8), np.float32))

    with pytest.raises(IndexStoreError, match="item 'e'"):
        write_half()
    assert [item.id for item in collection.scan()] == ["b", "c"]
    assert collection.generation() == before + 1
    collection.upsert([Item("f")], unit(1))
    assert collection.generation() == before + 2


@pytest.mark.parametrize(
    ("items", "vectors", "says"),
    [
        ([Item("a")], unit(1, dim=7), r"\(1, 7\).*needs \(1, 8\)"),
        ([Item("a")], unit(2), r"\(2, 8\)"),
        ([Item("a"), Item("b")], np.stack([unit(1)[0], np.zeros(8)]), "'b' has length 0"),
        ([Item("a")], np.full((1, 8), np.nan), "'a' has length nan"),
        ([Item("a")], np.full((1, 8), np.inf), "'a' has length inf"),
        ([Item("a")], unit(1) * 1.01, "'a' has length 1.01"),
        ([Item("a"), Item("b"), Item("a")], unit(3), "'a' is given twice"),
        ([Item("")], unit(1), "1 to 512 bytes"),
        ([Item("\u00e9" * 257)], unit(1), "1 to 512 bytes"),
        ([Item(".")], unit(1), "'.' is not allowed"),
        ([Item("a"), Item("..")], unit(2), "'..' is not allowed"),
        ([Item("\ud800")], unit(1), "id"),
        ([Item("a", caption="\ud800")], unit(1), "'a': caption"),
        ([Item("a", metadata={"x": float("nan")})], unit(1), "'a': metadata"),
        ([Item("a", metadata={"x": "\ud800"})], unit(1), "'a': metadata"),
        ([Item("a", metadata={"x": {1, 2}})], unit(1), "'a': metadata"),
        ([Item("a", metadata={"x": nested(64)})], unit(1), "'a': .* more than 64 deep"),
        ([Item("a", metadata={"x": nested(500)})], unit(1), "'a': .* more than 64 deep"),
        ([Item("a", metadata={"x": nested(5000)})], unit(1), "'a': .* more than 64 deep"),
    ],
)
def test_what_cannot_be_stored_is_refused_whole(
    collection: Collection, items: list[Item], vectors: np.ndarray, says: str
) -> None:
    with pytest.raises(IndexStoreError, match=says):
        collection.upsert(items, vectors)
    assert collection.count() == 0
    assert collection.generation() == 0


@pytest.mark.parametrize("part", ["caption", "source", "metadata"])
def test_what_an_item_holds_is_bounded(collection: Collection, part: str) -> None:
    rest = len('{"m": ""}') if part == "metadata" else len("{}")
    for size, fits in ((2**20 - rest, True), (2**20 - rest + 1, False)):
        text = "\u00e9" * (size // 2) + "x" * (size % 2)  # so many bytes
        item = Item("a", **{part: {"m": text} if part == "metadata" else text})
        if fits:
            collection.upsert([item], unit(1))
        else:
            with pytest.raises(ItemTooLarge, match="'a': .* 1048577 bytes"):
                collection.upsert([item], unit(1))
    rowids = collection.rowids()
    assert collection.sizes_of(rowids) == {int(rowids[0]): 2**20}


def test_the_rows_of_a_page_are_those_of_its_items(collection: Collection) -> None:
    collection.upsert([Item(id, caption=id) for id in ("c", "a", "b")], unit(3))
    items = collection.items_of(collection.page_rowids("a", 2))
    assert [items[rowid].id for rowid in collection.page_rowids("a", 2).tolist()] == ["b", "c"]
    assert collection.page_rowids("c").tolist() == []


def test_an_item_needs_a_vector(collection: Collection) -> None:
    with pytest.raises(IndexStoreError, match="1 items without vectors"):
        collection.upsert([Item("a")], None)
    with pytest.raises(IndexStoreError, match="text vector of item 'a' has length 0"):
        collection.upsert([Item("a")], unit(1), text_vectors=np.zeros((1, 8)))
    assert collection.count() == 0


def test_each_field_has_vectors_of_its_own(collection: Collection) -> None:
    pictures, texts = unit(6), unit(6, seed=1)
    both, picture, text = ["a", "b"], ["c", "d"], ["e", "f"]
    collection.upsert([Item(id) for id in both], pictures[:2], text_vectors=texts[:2])
    collection.upsert([Item(id) for id in text], None, text_vectors=texts[4:])
    collection.upsert([Item(id) for id in picture], pictures[2:4])
    row = collection.rowids_of([*both, *picture, *text, "none"])
    assert collection.rowids("image").tolist() == sorted(row[id] for id in both + picture)
    assert collection.rowids("text").tolist() == sorted(row[id] for id in both + text)
    for field, ids, vectors in (
        ("image", both + picture, pictures[:4]),
        ("text", both + text, texts[[0, 1, 4, 5]]),
    ):
        rowids = np.array([row[id] for id in ids])
        assert np.array_equal(collection.vectors_of(rowids, field), vectors)
        blocks = list(collection.vector_blocks(field=field))
        assert np.array_equal(np.concatenate([block[0] for block in blocks]), np.sort(rowids))
        order = np.argsort(rowids)
        assert np.array_equal(np.concatenate([block[1] for block in blocks]), vectors[order])
    with pytest.raises(IndexStoreError, match="damaged"):
        collection.vectors_of(np.array([row["e"]]), "image")
    collection.delete(both)
    assert len(collection.rowids("image")) == len(collection.rowids("text")) == 2


def test_a_replaced_item_keeps_no_vector_of_the_old_one(collection: Collection) -> None:
    collection.upsert([Item("a")], unit(1), text_vectors=unit(1))
    collection.upsert([Item("a")], unit(1))
    assert collection.rowids("text").tolist() == []
    assert not list(collection.vector_blocks(field="text"))


def test_an_unknown_field_is_named(collection: Collection) -> None:
    for read in (collection.rowids, lambda field: list(collection.vector_blocks(field=field))):
        with pytest.raises(IndexStoreError, match="'sound' is not allowed; use one of image, text"):
            read("sound")


def test_blocks_are_bounded_and_go_on_after_a_row(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.collection.BLOCK_ROWS", 3)
    vectors = unit(8)
    collection.upsert([Item(f"{i}", metadata={"n": i}) for i in range(8)], vectors)
    assert [len(rowids) for rowids, _ in collection.vector_blocks()] == [3, 3, 2]
    assert [rowids.tolist() for rowids, _ in collection.vector_blocks(after=5)] == [[6, 7, 8]]
    texts = [text for _, some in collection.metadata_blocks(after=1) for text in some]
    assert texts == [f'{{"n": {i}}}' for i in range(1, 8)]
    assert collection.rowids().tolist() == list(range(1, 9))


def test_what_belongs_to_rows_is_found_by_their_numbers(collection: Collection) -> None:
    items = [Item("a", "one"), Item("b", metadata={"x": [1]})]
    collection.upsert(items, unit(2), [b"jpeg", None])
    rows = collection.rowids()
    assert collection.ids_of(rows) == {1: "a", 2: "b"}
    assert collection.items_of(rows) == dict(zip((1, 2), items, strict=True))
    assert collection.thumbnails_of(rows) == {1: b"jpeg"}
    assert collection.thumbnail_sizes_of(rows) == {1: 4}
    assert collection.rowids_of(["b", "none"]) == {"b": 2}


def test_a_unit_is_noted_with_its_items_or_not_at_all(collection: Collection) -> None:
    first, empty = Unit("shard 0", "d" * 64, 1, 0), Unit("shard 1", "e" * 64, 0, 7)
    collection.upsert([Item("a")], unit(1), unit=first)
    collection.upsert([], None, unit=empty)
    with pytest.raises(IndexStoreError, match="length 0"):
        collection.upsert([Item("b")], np.zeros((1, 8)), unit=Unit("shard 2", "f", 1, 0))
    assert collection.units() == {"shard 0": first, "shard 1": empty}
    again = Unit("shard 0", "0" * 64, 2, 1)
    collection.upsert([], None, unit=again)
    assert collection.units() == {"shard 0": again, "shard 1": empty}
    assert collection.count() == 1


def test_half_precision_rounds_once(tmp_path: Path) -> None:
    vectors = unit(50)
    with Collection.create(tmp_path, **MODEL, dtype="float16") as collection:
        collection.upsert([Item(f"{i}") for i in range(50)], vectors * 1.0005)
        ((rowids, stored),) = list(collection.vector_blocks())
        assert collection.dtype == stored.dtype == np.float16
        norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        assert np.array_equal(stored, (vectors / norms).astype(np.float16))
        read = collection.vectors_of(rowids)
        assert read.dtype == np.float32
        assert np.array_equal(read, stored.astype(np.float32))
        collection.upsert([Item(f"{i}") for i in range(50)], stored)
        ((_, again),) = list(collection.vector_blocks())
        assert np.array_equal(again, stored)
    with Collection.open(tmp_path) as collection:
        assert collection.dtype == np.float16


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IndexStoreError, match="'int8' is not allowed; use one of float32, float16"):
        Collection.create(tmp_path, **MODEL, dtype="int8")
    Collection.open_or_create(tmp_path, **MODEL, dtype="float16").close()
    Collection.open_or_create(tmp_path, **MODEL, dtype="float16").close()
    with pytest.raises(IndexStoreError, match="in float16, not in float32"):
        Collection.open_or_create(tmp_path, **MODEL, dtype="float32")
    with Collection.open_or_create(tmp_path, **MODEL) as collection:
        assert collection.dtype == np.float16


def test_a_failed_write_leaves_what_was_there(collection: Collection) -> None:
    collection.upsert([Item("a", "old")], unit(1))
    with pytest.raises(IndexStoreError, match="2 thumbnails for 1"):
        collection.upsert([Item("a", "new")], unit(1), [b"", b""])
    with pytest.raises(IndexStoreError, match="Unicode"):
        collection.delete(["a", "\ud800"])
    assert collection.get(["a"])["a"].caption == "old"


def test_vectors_of_about_unit_length_are_made_exact(collection: Collection) -> None:
    collection.upsert([Item("a")], unit(1) * 1.0005)
    stored = collection.vectors_of(collection.rowids())
    assert np.allclose(stored, unit(1), atol=1e-7)
    assert abs(np.linalg.norm(stored.astype(np.float64)) - 1) < 1e-7


@pytest.mark.parametrize("huge", [1e20, 1e200])
def test_a_vector_too_long_to_square_is_refused_quietly(
    collection: Collection, huge: float
) -> None:
    with pytest.raises(IndexStoreError, match="'a' has length"):
        collection.upsert([Item("a")], np.full((1, 8), huge))


def test_vectors_of_another_model_are_refused_naming_both(tmp_path: Path) -> None:
    with Collection.create(tmp_path / "pets", **MODEL) as collection:
        vectors = np.eye(8, dtype=np.float32)[:1]
        with pytest.raises(IndexStoreError, match=f"{'a' * 12}, not by .* {'b' * 12}"):
            collection.upsert([Item("1")], vectors, fingerprint="b" * 64)
        assert collection.count() == 0
        collection.upsert([Item("1")], vectors, fingerprint=MODEL["fingerprint"])
        assert collection.count() == 1


def test_an_existing_collection_is_not_created_again(tmp_path: Path) -> None:
    Collection.create(tmp_path / "pets", **MODEL).close()
    with pytest.raises(IndexStoreError, match="holds a collection already"):
        Collection.create(tmp_path / "pets", **MODEL)


def test_another_models_collection_is_refused_naming_both(tmp_path: Path) -> None:
    Collection.open_or_create(tmp_path / "pets", **MODEL).close()
    Collection.open_or_create(tmp_path / "pets", **MODEL).close()
    with pytest.raises(IndexStoreError, match=f"{'a' * 12}, not by the one with {'b' * 12}"):
        Collection.open_or_create(tmp_path / "pets", **(MODEL | {"fingerprint": "b" * 64}))


def test_what_is_no_collection_is_named(tmp_path: Path) -> None:
    with pytest.raises(IndexStoreError, match="clipserve embed"):
        Collection.open(tmp_path)
    (tmp_path / DATABASE).write_bytes(b"not a database at all" * 100)
    with pytest.raises(IndexStoreError, match="not a collection, or damaged"):
        Collection.open(tmp_path)


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / DATABASE)) as database:
        database.execute("CREATE TABLE theirs (x)")
    before = (tmp_path / DATABASE).read_bytes()
    with pytest.raises(IndexStoreError, match="another SQLite database"):
        Collection.open(tmp_path)
    with pytest.raises(IndexStoreError, match="another SQLite database"):
        Collection.open_or_create(tmp_path, **MODEL)
    assert (tmp_path / DATABASE).read_bytes() == before


def test_a_half_made_database_is_completed(tmp_path: Path) -> None:
    (tmp_path / DATABASE).touch()  # killed between making the file and the tables
    with Collection.open_or_create(tmp_path, **MODEL) as collection:
        assert collection.count() == 0


def test_a_closed_collection_says_so(tmp_path: Path) -> None:
    collection = Collection.create(tmp_path, **MODEL)
    collection.close()
    with pytest.raises(IndexStoreError, match="closed"):
        collection.count()
    assert not (tmp_path / f"{DATABASE}-wal").exists()


def test_a_snapshot_does_not_see_later_writes(collection: Collection) -> None:
    collection.upsert([Item("a")], unit(1))

    def write() -> None:
        collection.upsert([Item("b")], unit(1))

    with collection.snapshot() as generation:
        writer = threading.Thread(target=write)
        writer.start()
        writer.join()
        assert generation == collection.generation() == 1
        assert [item.id for item in collection.scan()] == ["a"]
    assert collection.generation() == 2


def test_a_snapshot_inside_another_is_the_same(collection: Collection) -> None:
    with collection.snapshot() as outer:
        with collection.snapshot() as inner:
            assert inner == outer == 0
        writer = threading.Thread(target=collection.upsert, args=([Item("a")], unit(1)))
        writer.start()
        writer.join()
        assert collection.count() == 0  # the inner one has not ended it
    assert collection.count() == 1


def test_nothing_is_written_inside_a_snapshot(collection: Collection) -> None:
    with (
        collection.snapshot(),
        pytest.raises(IndexStoreError, match="inside a snapshot of this thread; leave"),
    ):
        collection.upsert([Item("a")], unit(1))
    collection.upsert([Item("a")], unit(1))
    assert collection.count() == 1


def test_writing_while_rows_are_being_read_says_so(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.collection.BLOCK_ROWS", 2)
    collection.upsert([Item(f"{i}") for i in range(8)], unit(8))
    blocks = collection.vector_blocks()
    next(blocks)
    writer = threading.Thread(target=collection.delete, args=(["0"],))
    writer.start()
    writer.join()
    with pytest.raises(IndexStoreError, match="still reading an older state"):
        collection.delete(["1"])
    assert sum(len(rowids) for rowids, _ in blocks) == 6  # the rest, as it was
    assert collection.delete(["1"]) == 1


def test_deletions_long_ago_are_forgotten_and_that_is_told(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.collection.REMEMBERED_WRITES", 3)
    for i in range(6):
        collection.upsert([Item("a", f"{i}")], unit(1))
    assert collection.deleted_since(2) is None
    assert collection.deleted_since(3).tolist() == [3, 4, 5]
    assert collection.deleted_since(7) is None  # a state that never was: of a restored backup


def test_millions_of_deletions_take_eight_bytes_each_to_know_or_check(
    collection: Collection,
) -> None:
    count = 200_000
    connection = collection._database.connection()
    rows = ((0, row) for row in range(10, 10 + count))
    with transaction(connection):
        connection.executemany("INSERT INTO deletions VALUES (1 + ?, ?)", rows)
    for read in (
        lambda: collection.deleted_since(0),
        lambda: check(collection.path),
    ):
        tracemalloc.start()
        try:
            read()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 40 * count  # numbers as objects of their own take eighty and more
    deleted = collection.deleted_since(0)
    assert deleted is not None
    assert np.array_equal(np.sort(deleted), np.arange(10, 10 + count))


def test_a_full_disk_loses_nothing(collection: Collection) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    acknowledged: list[str] = []

    def fill() -> None:
        for i in range(1000):
            collection.upsert([Item(f"{i}")], unit(1), [b"x" * 20_000])
            acknowledged.append(f"{i}")

    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, hard))
    try:
        with pytest.raises(IndexStoreError, match="nothing of this write was kept"):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 1 < len(acknowledged) < 1000
    assert collection.contains([f"{i}" for i in range(1000)]) == set(acknowledged)
    collection.upsert([Item("more")], unit(1))
    assert collection.count() == len(acknowledged) + 1


@contextlib.contextmanager
def unwritable(path: Path) -> Iterator[None]:
    """Not even root may write there meanwhile: it is not root meanwhile."""
    path.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        path.chmod(0o755)


def test_a_read_only_directory_can_be_read_and_says_so_when_written() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pets"
        Path(folder).chmod(0o755)
        with Collection.create(path, **MODEL) as collection:
            collection.upsert([Item("a")], unit(1))
        with unwritable(path):
            with Collection.open(path, read_only=True) as collection:
                assert [item.id for item in collection.scan()] == ["a"]
                assert np.allclose(collection.vectors_of(collection.rowids()), unit(1))
                with pytest.raises(IndexStoreError, match="read-only"):
                    collection.upsert([Item("b")], unit(1))
            with pytest.raises(IndexStoreError, match="make its directory and files writable"):
                Collection.open(path)
            with pytest.raises(IndexStoreError, match="cannot be made: Permission denied"):
                Collection.create(path / "below", **MODEL)


def all_ids(collection: Collection) -> list[str]:
    return [item.id for item in collection.scan(limit=100_000)]


def test_processes_and_threads_write_together_without_loss(tmp_path: Path) -> None:
    path = tmp_path / "pets"
    code = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from index.collection import Collection, Item\n"
        "c = Collection.open_or_create(\n"
        "    Path(sys.argv[1]), fingerprint='a' * 64, model_name='tiny', embed_dim=8)\n"
        "for i in range(40): c.upsert([Item(f'{sys.argv[2]}-{i}')], np.eye(8)[:1])\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(path), name], cwd=ROOT) for name in "xyz"
    ]
    with Collection.open_or_create(path, **MODEL) as collection:

        def write(name: str) -> None:
            for i in range(40):
                collection.upsert([Item(f"{name}-{i}")], unit(1))

        threads = [threading.Thread(target=write, args=(name,)) for name in "uv"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [writer.wait() for writer in writers] == [0, 0, 0]
        assert collection.count() == 200
        assert collection.generation() == 200
        assert set(all_ids(collection)) == {f"{n}-{i}" for n in "xyzuv" for i in range(40)}
