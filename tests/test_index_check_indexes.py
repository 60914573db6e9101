"""What `check` makes of built indexes that are damaged, or do not fit."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from damaged import fill, flip, leaf_of, vectors

from index import cache
from index.build import build
from index.check import _Check, check
from index.collection import DATABASE, Collection, directory_lock
from index.info import IndexInfo
from index.upkeep import snapshot


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return fill(tmp_path / "pets")


@pytest.mark.parametrize("kind", ["faiss", "vectors", "rows", "queries"])
def test_a_damaged_index_is_named_and_built_again_as_it_was_asked_for(
    path: Path, kind: str
) -> None:
    with Collection.open(path) as collection:
        before = build(collection, kind="IVF2,Flat", queries=vectors(40, seed=7), recall_target=0.8)
        assert check(path).repaired == []
        file = cache.folder(path, "image") / before.files[kind]["name"]
        flip(file, file.stat().st_size // 2)
        (problem,) = check(path, repair=False).problems
        assert f"the index of image vectors: {file.name} is damaged" in problem
        report = check(path)
        assert report.problems == []
        assert f"{file.name} is damaged; built again as it was asked for" in report.repaired[0]
        with collection.snapshot() as generation:
            found = cache.read(collection, "image", generation)
        assert found
        assert (found.info.kind, found.info.recall_target) == ("IVF2,Flat", 0.8)
        assert found.info.asked == before.asked
        # Queries that are damaged are lost: the collection's own texts take their place.
        assert ("40 given queries" in found.info.queries) == (kind != "queries")
        assert check(path).repaired == []


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: flip(file, 5)])
def test_an_index_whose_description_is_lost_is_built_again_by_itself(
    path: Path, damage: Callable[[Path], None]
) -> None:
    with Collection.open(path) as collection:
        build(collection, kind="IVF2,Flat", field="text")
        damage(cache.folder(path, "text") / cache.INFO_FILE)
        report = check(path)
        assert report.problems == []
        assert "built again with --kind auto" in report.repaired[0]
        info = cache.read_info(path, "text")
        assert info
        assert (info.kind, info.count) == ("exact", 599)


def test_a_damaged_index_of_a_damaged_collection_is_not_built_from_it(path: Path) -> None:
    with Collection.open(path) as collection:
        info = build(collection)
    file = cache.folder(path, "image") / info.files["vectors"]["name"]
    flip(file, 100)
    flip(path / DATABASE, leaf_of(path, "vectors_image") + 9000)
    report = check(path)
    assert report.repaired == []
    assert f"{file.name} is damaged; it is built again once the rest" in report.problems[-1]


def test_an_index_that_cannot_be_built_again_is_a_problem(path: Path) -> None:
    with Collection.open(path) as collection:
        info = build(collection)
    flip(cache.folder(path, "image") / info.files["vectors"]["name"], 100)
    with directory_lock(path, ".index.lock", wait=False):
        report = check(path)
    assert report.repaired == []
    assert "could not be built again" in report.problems[0]
    assert "being indexed by another process" in report.problems[0]


def test_a_build_that_was_ended_left_no_damaged_index(path: Path) -> None:
    folder = cache.folder(path, "image")
    folder.mkdir(parents=True)
    (folder / ".vectors.999.tmp").write_bytes(b"left")
    report = check(path)
    assert (report.problems, report.repaired) == ([], [])


def test_an_index_of_another_collection_is_built_again(path: Path, tmp_path: Path) -> None:
    with Collection.open(path) as collection:
        build(collection, kind="IVF2,Flat")
    snapshot(path, tmp_path / "copy")
    shutil.copytree(path / "indexes", tmp_path / "copy" / "indexes")
    report = check(tmp_path / "copy")
    assert "built from another collection" in report.repaired[0]
    with Collection.open(tmp_path / "copy") as copy:
        info = cache.read_info(copy.path)
        assert info
        assert (info.identity, info.kind) == (copy.identity, "IVF2,Flat")
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
