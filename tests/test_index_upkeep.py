import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from damaged import MODEL, PAGE, fill, flip, leaf_of, vectors

from clipserve.errors import IndexStoreError
from index import upkeep
from index.check import check
from index.collection import DATABASE, Collection, Item
from index.upkeep import compact, snapshot


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return fill(tmp_path / "pets")


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


def test_a_snapshot_takes_no_place_that_was_taken_meanwhile(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "copy"
    copy = upkeep._copy

    def taken_meanwhile(*arguments: Any) -> None:
        copy(*arguments)
        out.mkdir()
        (out / "theirs").write_text("x")

    monkeypatch.setattr(upkeep, "_copy", taken_meanwhile)
    with pytest.raises(IndexStoreError, match="copy is there already"):
        snapshot(path, out)
    assert [file.name for file in out.iterdir()] == ["theirs"]
    assert sorted(file.name for file in tmp_path.iterdir() if file.name[0] == ".") == []


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
