"""What `check` finds in the collection itself."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from damaged import MODEL, PAGE, fill, flip, leaf_of, opened, vectors

from clipserve.errors import IndexStoreError
from index import acknowledged, cache
from index.acknowledged import ACKNOWLEDGED
from index.build import build
from index.check import check
from index.collection import DATABASE, REMEMBERED_WRITES, Collection, Item
from index.search import Searcher
from index.upkeep import compact


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return fill(tmp_path / "pets")


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


def test_what_was_deleted_is_not_read_to_open_and_search(path: Path) -> None:
    """There may be millions of them."""
    flip(path / DATABASE, leaf_of(path, "deletions") + PAGE - 100)
    with Searcher(path, device="cpu") as searcher:
        assert len(searcher.search(vectors(1), 3)[0]) == 3
    assert any(line.startswith("deletions: damaged") for line in check(path).problems)


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
    assert "built from another collection, or from a later state" in report.repaired[1]
    assert check(path).repaired == check(path).problems == []
    with Collection.open(path) as collection:
        # Whatever was kept of the lost writes must never be taken for what comes now.
        assert collection.identity != old
        info = cache.read_info(path)
        assert info
        assert (info.identity, info.generation) == (collection.identity, collection.generation())
        assert collection.generation() > 5 + REMEMBERED_WRITES
        assert collection.deleted_since(2) is collection.deleted_since(5) is None
        collection.upsert([Item("new")], vectors(1))
        assert collection.rowids()[-1] > 2**32


def test_a_copy_of_the_database_alone_is_not_taken_for_all_unasked(path: Path) -> None:
    (path / ACKNOWLEDGED).unlink()
    for _ in range(2):
        (problem,) = check(path).problems
        assert "'acknowledged' is missing" in problem
        assert problem.endswith("clipserve index check DIR --accept-loss")
    report = check(path, accept_loss=True)
    assert report.problems == []
    assert report.repaired[0].endswith("accepted")
    assert check(path).repaired == check(path).problems == []


def test_a_note_of_the_last_write_that_is_damaged_is_written_again(path: Path) -> None:
    flip(path / ACKNOWLEDGED, 5)
    assert "'acknowledged' is" in check(path, repair=False).problems[0]
    report = check(path)
    assert report.problems == []
    assert "what is there was taken for all" in report.repaired[0]
    with Collection.open(path) as collection:
        assert acknowledged.read(path, collection.identity) == 2


def test_without_leave_to_repair_nothing_is_changed(path: Path) -> None:
    (path / ACKNOWLEDGED).unlink()
    before = (path / DATABASE).read_bytes()
    assert check(path, repair=False).repaired == []
    assert (path / DATABASE).read_bytes() == before
    assert not (path / ACKNOWLEDGED).exists()


def test_reports_can_be_printed_as_json(path: Path) -> None:
    assert json.loads(json.dumps(vars(check(path))))["items"] == 599
    assert set(vars(compact(path))) == {"before", "after"}
