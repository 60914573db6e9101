import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from clipserve.errors import IndexStoreError
from index import acknowledged, cache
from index.acknowledged import ACKNOWLEDGED
from index.build import build
from index.check import _Check, check, compact, snapshot
from index.collection import DATABASE, REMEMBERED_WRITES, Collection, Item
from index.info import IndexInfo
from index.sqlite import connect

MODEL = {"fingerprint": "a" * 64, "model_name": "tiny", "embed_dim": 64}
PAGE = 16384


def vectors(count: int, dim: int = 64, seed: int = 0) -> np.ndarray:
    made = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """600 items with everything, in many pages; closed cleanly."""
    path = tmp_path / "pets"
    with Collection.create(path, **MODEL) as collection:
        items = [Item(f"{i:03d}", "x" * 200, metadata={"n": i}) for i in range(600)]
        pictures = [b"j" * 400] * 600
        collection.upsert(items, vectors(600), pictures, text_vectors=vectors(600, seed=1))
        collection.delete(["000"])
    return path


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The database, to write into it what clipserve never would; its checksums stay right."""
    with contextlib.closing(connect(path / DATABASE, "mode=rw")) as connection:
        yield connection


def leaf_of(path: Path, tree: str) -> int:
    """Where the second-last leaf page of a table or an index begins, in bytes; or its only one."""
    with opened(path) as connection:
        query = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        ((root,),) = connection.execute(query, (tree,)).fetchall()
    data = (path / DATABASE).read_bytes()
    start = (root - 1) * PAGE
    if data[start] in (10, 13):  # a leaf
        return start
    count = int.from_bytes(data[start + 3 : start + 5], "big")
    cell = int.from_bytes(data[start + 12 + 2 * (count - 1) :][:2], "big")
    return (int.from_bytes(data[start + cell :][:4], "big") - 1) * PAGE


def flip(file: Path, position: int, bit: int = 3) -> None:
    with file.open("r+b") as opened:
        opened.seek(position)
        (value,) = opened.read(1)
        opened.seek(position)
        opened.write(bytes([value ^ 1 << bit]))


def test_a_whole_collection_has_no_problems(path: Path) -> None:
    report = check(path)
    assert (report.items, report.problems, report.repaired) == (599, [], [])
    with Collection.open(path) as collection:  # nor while it is being written to
        collection.upsert([Item("more")], vectors(1))
        assert check(path).problems == []


def test_an_empty_collection_has_no_problems(tmp_path: Path) -> None:
    Collection.create(tmp_path, **MODEL).close()
    assert check(tmp_path).problems == []


def test_what_is_no_collection_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IndexStoreError, match="is not a collection"):
        check(tmp_path)


@pytest.mark.parametrize("table", ["items", "vectors_image", "vectors_text", "thumbnails"])
def test_a_damaged_page_is_named_with_the_items_on_it(path: Path, table: str) -> None:
    flip(path / DATABASE, leaf_of(path, table) + 9000)
    report = check(path)
    assert any(line.startswith(f"{table}: damaged: a page's checksum") for line in report.problems)
    ((count, names),) = [
        (int(line.split()[0]), line.rpartition(": ")[2])
        for line in report.problems
        if f"items cannot be read from {table}: " in line
    ]
    assert 10 < count < 600
    first = int(names.split(",")[0].strip("'"))
    assert names == ", ".join(f"'{first + i:03d}'" for i in range(10)) + ", ..."
    # Exactly those: the one before can be read, the first and the last cannot.
    with Collection.open(path) as collection:
        rows = {f"{i:03d}": i + 1 for i in range(600)}
        read: dict[str, Callable[[np.ndarray], object]] = {
            "items": collection.items_of,
            "vectors_image": collection.vectors_of,
            "vectors_text": lambda rowids: collection.vectors_of(rowids, "text"),
            "thumbnails": collection.thumbnails_of,
        }
        for id, is_good in (
            (f"{first - 1:03d}", True),
            (f"{first:03d}", False),
            (f"{first + count - 1:03d}", False),
        ):
            with contextlib.nullcontext() if is_good else pytest.raises(IndexStoreError):
                read[table](np.array([rows[id]]))


@pytest.mark.parametrize("tree", ["items_id", "items_fields"])
def test_a_damaged_index_of_the_database_is_named(path: Path, tree: str) -> None:
    flip(path / DATABASE, leaf_of(path, tree) + 9000)
    assert any("structure: " in line for line in check(path).problems)


def test_a_header_that_cannot_be_read_is_a_problem(path: Path) -> None:
    flip(path / DATABASE, 20)
    report = check(path)
    assert "its pages are not checked" in report.problems[0]
    assert report.items == 0


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("DELETE FROM vectors_image WHERE rowid = 7", "1 items have no image vector: '006'"),
        ("DELETE FROM vectors_text WHERE rowid < 4", "2 items have no text vector: '001', '002'"),
        ("DELETE FROM items WHERE rowid = 7", "vectors_image: 1 rows belong to no item"),
        ("DELETE FROM items WHERE rowid = 7", "thumbnails: 1 rows belong to no item"),
        ("DELETE FROM items WHERE rowid = 7", "the collection counts 599 items, and has 598"),
        (
            "UPDATE vectors_image SET vector = zeroblob(256) WHERE rowid = 9",
            "1 items have no image vector of unit length, but something else: '008'",
        ),
        (
            "UPDATE vectors_text SET vector = zeroblob(255) WHERE rowid = 9",
            "1 items have no text vector of unit length, but something else: '008'",
        ),
        (
            "UPDATE vectors_image SET vector = CAST(x'0000c07f' || zeroblob(252) AS BLOB)"
            " WHERE rowid = 9",
            "1 items have no image vector of unit length",  # it is not a number
        ),
        ("UPDATE items SET metadata = '{' WHERE rowid = 9", "id or metadata that cannot be: '008'"),
        ("UPDATE items SET metadata = '[]' WHERE rowid = 9", "metadata that cannot be: '008'"),
        ("UPDATE items SET fields = 1 WHERE rowid = 9", "vectors_text: 1 rows belong to no item"),
        ("INSERT INTO deletions VALUES (2, 9)", "1 items were removed, and are there: '008'"),
        ("UPDATE sqlite_sequence SET seq = 5", "row 600 is above the last one given, 5"),
    ],
)
def test_what_does_not_fit_together_is_named(path: Path, statement: str, says: str) -> None:
    with opened(path) as connection:
        connection.execute(statement)
    assert any(says in line for line in check(path).problems), check(path).problems


def test_metadata_too_deep_to_be_read_is_named(path: Path) -> None:
    deep = '{"a":' * 100_000 + "{}" + "}" * 100_000
    with opened(path) as connection:
        connection.execute("UPDATE items SET metadata = ? WHERE id = '007'", (deep,))
    assert check(path).problems == ["1 items have an id or metadata that cannot be: '007'"]
    with Collection.open(path) as collection:
        with pytest.raises(IndexStoreError, match=r"'007': its stored metadata cannot be read: .*"):
            collection.get(["007"])
        collection.upsert([Item("007")], vectors(1))
        assert collection.get(["007"])["007"].metadata == {}


def test_acknowledged_writes_that_are_missing_are_a_problem_until_accepted(path: Path) -> None:
    with Collection.open(path) as collection:
        acknowledged.advance(path, collection.identity, 5)
        build(collection)
        old = collection.identity
    for _ in range(2):
        report = check(path)
        assert report.problems[0].startswith("acknowledged writes are missing: 3 of 5")
        assert report.items == 599
    report = check(path, accept_loss=True)
    assert report.problems == []
    assert report.repaired[0].startswith("acknowledged writes are missing: 3 of 5")
    assert report.repaired[0].endswith("accepted")
    assert check(path).repaired == check(path).problems == []
    with Collection.open(path) as collection:
        # Whatever was kept of the lost writes must never be taken for what comes now.
        assert collection.identity != old
        assert cache.read_info(path) is None
        assert collection.generation() > 5 + REMEMBERED_WRITES
        assert collection.deleted_since(2) is collection.deleted_since(5) is None
        collection.upsert([Item("new")], vectors(1))
        assert collection.rowids()[-1] > 2**32


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: flip(file, 5)])
def test_a_note_of_the_last_write_that_cannot_be_read_is_written_again(
    path: Path, damage: Callable[[Path], None]
) -> None:
    damage(path / ACKNOWLEDGED)
    assert "'acknowledged' is" in check(path, repair=False).problems[0]
    report = check(path)
    assert report.problems == []
    assert "what is there was taken for all" in report.repaired[0]
    with Collection.open(path) as collection:
        assert acknowledged.read(path, collection.identity) == 2


def test_a_damaged_index_is_removed_and_built_again(path: Path) -> None:
    with Collection.open(path) as collection:
        build(collection)
        assert check(path).repaired == []
        files = sorted(file for file in cache.folder(path, "image").iterdir() if file.is_file())
        assert len(files) >= 2
        for file in files:
            flip(file, file.stat().st_size // 2)
            assert "the index of image vectors" in check(path, repair=False).problems[0]
            report = check(path)
            assert report.problems == []
            assert "removed, make it again: clipserve index build" in report.repaired[0]
            assert not cache.folder(path, "image").exists()
            build(collection)


def test_an_index_of_another_collection_is_removed(path: Path, tmp_path: Path) -> None:
    with Collection.open(path) as collection:
        build(collection)
    snapshot(path, tmp_path / "copy")
    shutil.copytree(path / "indexes", tmp_path / "copy" / "indexes")
    report = check(tmp_path / "copy")
    assert "built from another collection" in report.repaired[0]
    assert check(path).repaired == []


def test_an_index_built_while_the_items_are_checked_stays(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Collection.open(path) as collection:
        build(collection)
        read = _Check.contents

        def built_meanwhile(self: _Check) -> None:
            read(self)
            for step in (lambda: collection.delete(["001"]), lambda: build(collection)):
                thread = threading.Thread(target=step)
                thread.start()
                thread.join()

        monkeypatch.setattr(_Check, "contents", built_meanwhile)
        report = check(path)
        assert (report.problems, report.repaired) == ([], [])
        assert cache.folder(path, "image").exists()


def test_an_index_replaced_while_it_is_checked_is_not_damaged(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Collection.open(path) as collection:
        build(collection)
        read = cache.read_info
        left = ["001", "002"]

        def replaced_meanwhile(path: Path, field: str = "image") -> IndexInfo | None:
            info = read(path, field)
            if left and info is not None:
                collection.delete([left.pop()])
                with monkeypatch.context() as patch:
                    patch.setattr(cache, "read_info", read)
                    build(collection)
            return info

        monkeypatch.setattr(cache, "read_info", replaced_meanwhile)
        assert check(path, repair=False).problems == []
        assert not left


def test_without_leave_to_repair_nothing_is_changed(path: Path) -> None:
    (path / ACKNOWLEDGED).unlink()
    before = (path / DATABASE).read_bytes()
    assert check(path, repair=False).repaired == []
    assert (path / DATABASE).read_bytes() == before
    assert not (path / ACKNOWLEDGED).exists()


def test_a_snapshot_is_a_collection_of_its_own(path: Path, tmp_path: Path) -> None:
    with Collection.open(path) as collection:
        snapshot(path, tmp_path / "copies" / "pets")
        collection.delete(["001"])
        with Collection.open(tmp_path / "copies" / "pets") as copy:
            assert copy.count() == 599
            assert copy.generation() == 2
            assert copy.identity != collection.identity
            assert np.array_equal(copy.vectors_of(copy.rowids()), vectors(600)[1:])
            copy.delete(["002", "003"])
            assert collection.count() == 598
    report = check(tmp_path / "copies" / "pets")
    assert (report.problems, report.repaired) == ([], [])
    with pytest.raises(IndexStoreError, match="is there already"):
        snapshot(path, tmp_path / "copies" / "pets")


def test_every_page_of_a_large_snapshot_carries_a_checksum(tmp_path: Path) -> None:
    """SQLite's VACUUM INTO leaves most of them without: it writes them before the first page."""
    model = MODEL | {"embed_dim": 512}
    with Collection.create(tmp_path / "big", **model) as collection:
        # More than SQLite keeps in memory, so that it writes pages in the middle of a write too.
        collection.upsert([Item(f"{i}") for i in range(4000)], vectors(4000, 512))
    assert check(tmp_path / "big").problems == []
    snapshot(tmp_path / "big", tmp_path / "copy")
    assert check(tmp_path / "copy").problems == []
    random = np.random.default_rng(0)
    file = tmp_path / "copy" / DATABASE
    for position in random.integers(PAGE, file.stat().st_size, 10).tolist():
        flip(file, position)
        assert check(tmp_path / "copy").problems
        flip(file, position)


def test_a_snapshot_is_taken_at_one_moment_while_others_write(path: Path, tmp_path: Path) -> None:
    stop = threading.Event()

    def write() -> None:
        with Collection.open(path) as collection:
            generation = 0
            while not stop.is_set():  # always ten of the same write
                items = [Item(f"w{i}", f"{generation}") for i in range(10)]
                collection.upsert(items, vectors(10))
                generation += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for n in range(5):
            snapshot(path, tmp_path / f"{n}")
    finally:
        stop.set()
        writer.join()
    for n in range(5):
        assert check(tmp_path / f"{n}").problems == []
        with Collection.open(tmp_path / f"{n}") as copy:
            written = copy.get([f"w{i}" for i in range(10)]).values()
            assert len({item.caption for item in written}) <= 1
            assert len(written) in (0, 10)


def test_a_damaged_collection_is_not_copied(path: Path, tmp_path: Path) -> None:
    flip(path / DATABASE, leaf_of(path, "vectors_image") + 500)
    with pytest.raises(IndexStoreError, match="a page's checksum is wrong"):
        snapshot(path, tmp_path / "copy")
    assert os.listdir(tmp_path) == ["pets"]


def test_compacting_gives_space_back_and_changes_nothing_else(path: Path) -> None:
    with Collection.open(path) as collection:
        collection.delete([f"{i:03d}" for i in range(600) if i % 5])
        kept, rowids = collection.scan(limit=600), collection.rowids()
        stored = collection.vectors_of(rowids)
        with collection.snapshot():
            report = compact(path)  # a reader does not mind
            assert collection.scan(limit=600) == kept
        compact(path)
        assert report.before > (path / DATABASE).stat().st_size * 2
        assert collection.scan(limit=600) == kept
        assert np.array_equal(collection.rowids(), rowids)
        assert np.array_equal(collection.vectors_of(rowids), stored)
    assert compact(path).after == (path / DATABASE).stat().st_size
    assert check(path).problems == []


def test_compacting_without_room_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100_000))
    before = (path / DATABASE).read_bytes()
    with pytest.raises(IndexStoreError, match=r"takes up to \d MB for a while, and 0 MB are free"):
        compact(path)
    assert (path / DATABASE).read_bytes() == before


def test_reports_can_be_printed_as_json(path: Path) -> None:
    assert json.loads(json.dumps(vars(check(path))))["items"] == 599
    assert set(vars(compact(path))) == {"before", "after"}
