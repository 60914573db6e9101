import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filtered import expected

from clipserve.errors import FilterError, IndexStoreError
from index import columns as module
from index.collection import Collection, Item
from index.columns import MAX_FIELDS, Columns
from index.filters import parse

MODEL = {"fingerprint": "a" * 64, "model_name": "tiny", "embed_dim": 4}


class Rows:
    """Metadata by row number, in the place of a collection; counts the rows that are read."""

    def __init__(self, *metadata: Any) -> None:
        self.live: dict[int, Any] = {}
        self.dead: dict[int, Any] = {}
        """what a snapshot from before still sees"""
        self.num_read = 0
        self._last = 0
        self.add(*metadata)

    def add(self, *metadata: Any) -> None:
        for each in metadata:
            self._last += 1
            self.live[self._last] = each

    def delete(self, *rowids: int) -> None:
        self.dead |= {rowid: self.live.pop(rowid) for rowid in rowids}

    def rowids(self) -> np.ndarray:
        return np.array(list(self.live), dtype=np.int64)

    def count(self) -> int:
        return len(self.live)

    def metadata_blocks(self, after: int = 0) -> Iterator[tuple[np.ndarray, list[str]]]:
        rowids = [rowid for rowid in self.live if rowid > after]
        for start in range(0, len(rowids), 10):
            block = rowids[start : start + 10]
            self.num_read += len(block)
            yield np.array(block), [json.dumps(self.live[rowid]) for rowid in block]

    def items_of(self, rowids: np.ndarray) -> dict[int, Item]:
        known = self.live | self.dead
        found = [rowid for rowid in rowids.tolist() if rowid in known]
        return {rowid: Item(str(rowid), metadata=known[rowid]) for rowid in found}


def test_a_filter_without_conditions_needs_no_metadata() -> None:
    rows = Rows({"a": 1}, {})
    columns = Columns(rows)
    assert columns.mask(parse({}), rows.rowids()).tolist() == [True, True]
    assert columns.mask(parse({"or": []}), rows.rowids()).tolist() == [False, False]
    assert columns.mask(parse({"a": 1}), rows.rowids()[:0]).tolist() == []
    assert rows.num_read == 0


def test_a_mask_is_the_callers_to_change() -> None:
    rows = Rows({"a": 1}, {"a": True}, {"a": "x"})
    columns = Columns(rows)
    for filter in ({"a": 1}, {"a": True}, {"a": "x"}, {"a": {"gt": 0}}, {"a": {"exists": True}}):
        mask = columns.mask(parse(filter), rows.rowids())
        before = mask.copy()
        mask[:] = ~mask
        assert np.array_equal(columns.mask(parse(filter), rows.rowids()), before)


def test_a_column_is_read_once_and_extended_by_later_rows() -> None:
    rows = Rows(*({"a": i} for i in range(1000)))
    columns = Columns(rows)
    for _ in range(3):
        columns.mask(parse({"a": {"lt": 10}}), rows.rowids())
    assert rows.num_read == 1000
    rows.add({"a": 1}, {"a": 99})
    assert columns.mask(parse({"a": {"lt": 10}}), rows.rowids()).sum() == 11
    assert columns.mask(parse({"a": {"lt": 10}}), rows.rowids()[-2:]).tolist() == [True, False]
    assert rows.num_read == 1002


def test_many_small_writes_are_read_few_times_and_leave_few_segments() -> None:
    rows = Rows({"a": 0})
    columns = Columns(rows)
    for i in range(1000):
        rows.add({"a": i})
        assert columns.mask(parse({"a": i}), rows.rowids()[-1:]).all()
    assert rows.num_read < 12_000
    assert len(columns._table.segments) <= 12


def test_segments_that_are_full_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_ROWS", 20)
    rows = Rows(*({"a": i} for i in range(100)))
    columns = Columns(rows)
    columns.mask(parse({"a": 1}), rows.rowids())
    rows.add(*({"a": i} for i in range(500)))
    assert columns.mask(parse({"a": 1}), rows.rowids()).sum() == 2
    assert rows.num_read == 600


def test_the_columns_used_last_are_kept() -> None:
    rows = Rows({str(i): i for i in range(2 * MAX_FIELDS)})
    columns = Columns(rows)

    def ask(*fields: int) -> int:
        before = rows.num_read
        filter = parse({str(i): i for i in fields})
        assert columns.mask(filter, rows.rowids()).all()
        return rows.num_read - before

    for i in range(MAX_FIELDS):
        assert ask(i) == 1
    assert ask(0) == 0
    assert ask(MAX_FIELDS) == 1  # in the place of 1
    assert ask(0) == 0
    assert ask(1) == 1
    assert len(columns._table.fields) == MAX_FIELDS
    assert ask(*range(MAX_FIELDS + 5)) == 1  # more than are kept
    assert ask(*range(MAX_FIELDS + 5)) == 0


def test_dead_rows_are_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_ROWS", 20)
    rows = Rows(*({"a": i} for i in range(100)))
    columns = Columns(rows)
    for i in range(1000):
        rows.delete(int(rows.rowids()[0]))
        rows.add({"a": i})
        assert columns.mask(parse({"a": {"gte": 0}}), rows.rowids()).all()
        assert columns._table.count() <= 2 * 100 + 20 + 1


def test_an_older_snapshot_has_rows_that_the_columns_never_saw() -> None:
    rows = Rows({"a": 1}, {"a": 2}, {"a": 1}, {})
    before = rows.rowids()
    rows.delete(1, 2, 4)
    columns = Columns(rows)
    assert columns.mask(parse({"a": 1}), rows.rowids()).tolist() == [True]
    assert columns.mask(parse({"a": 1}), before).tolist() == [True, False, True, False]
    assert columns.mask(parse({"a": {"ne": 1}}), before).tolist() == [False, True, False, True]


def test_a_row_that_is_not_there_matches_nothing() -> None:
    rows = Rows({"a": 2}, {"a": 2}, {"a": 2})
    del rows.live[2]
    mask = Columns(rows).mask(parse({"a": {"ne": 1}}), np.array([1, 2, 3, 4]))
    assert mask.tolist() == [True, False, True, False]


def test_row_numbers_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows()
    rows.live = {rowid: {"a": rowid % 7} for rowid in (3, 50, 10**6, 10**12, 10**12 + 5)}
    columns = Columns(rows)
    for wanted in (rows.rowids(), rows.rowids()[[0, 2, 4]]):
        mask = columns.mask(parse({"a": {"lt": 4}}), wanted)
        assert mask.tolist() == [rowid % 7 < 4 for rowid in wanted.tolist()]


def test_a_number_is_not_compared_with_a_field_of_texts() -> None:
    rows = Rows({"price": "45", "n": {"x": ["7"]}}, {"price": None}, {}, {"n": {"x": True}})
    columns = Columns(rows)
    for filter in (
        {"price": {"lt": 50}},
        {"price": 45},
        {"price": {"ne": 45}},
        {"price": {"in": [45, 46.5]}},
        {"or": [{"price": "45"}, {"not": {"price": {"gte": 45}}}]},
        {"n.x": 7},
    ):
        with pytest.raises(FilterError, match="no item has a number there, and some have text"):
            columns.mask(parse(filter), rows.rowids())
    with pytest.raises(FilterError, match=r"'price' with the number 50, .* --number-columns price"):
        columns.mask(parse({"price": {"lt": 50}}), rows.rowids())
    for filter, count in [
        ({"price": {"lt": "50"}}, 1),
        ({"price": {"in": [45, "45"]}}, 1),
        ({"price": {"in": [45, None]}}, 1),
        ({"price": {"exists": True}}, 2),
        ({"other": {"lt": 50}}, 0),
    ]:
        assert columns.mask(parse(filter), rows.rowids()).sum() == count


def test_one_number_anywhere_makes_a_field_one_of_numbers() -> None:
    rows = Rows({"price": "45"}, {"price": "46"}, {})
    columns, cheap = Columns(rows), parse({"price": {"lt": 50}})
    older = rows.rowids()
    with pytest.raises(FilterError):
        columns.mask(cheap, older)
    assert not columns.mask(cheap, older[2:]).any()  # these rows have no text there
    rows.add({"price": [45]})
    assert not columns.mask(cheap, older).any()  # the number came after the rows asked for
    assert columns.mask(cheap, rows.rowids()).tolist() == [False, False, False, True]


def test_a_field_whose_texts_are_gone_is_compared_with_numbers_again() -> None:
    rows = Rows({"price": "45"}, {})
    columns, cheap = Columns(rows), parse({"price": {"lt": 50}})
    with pytest.raises(FilterError):
        columns.mask(cheap, rows.rowids())
    rows.delete(1)
    assert not columns.mask(cheap, rows.rowids()).any()


def test_a_refused_filter_reads_no_metadata_again() -> None:
    rows = Rows(*({"price": str(i)} for i in range(100)))
    columns = Columns(rows)
    for _ in range(5):
        with pytest.raises(FilterError):
            columns.mask(parse({"price": 5}), rows.rowids())
    assert rows.num_read == 100


def test_metadata_that_is_no_json_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows({"a": 1}, {"a": 2})
    broken = [(np.array([1, 2]), ['{"a": 1}', '{"a": '])]
    monkeypatch.setattr(rows, "metadata_blocks", lambda after: iter(broken))
    with pytest.raises(IndexStoreError, match="metadata of row 2 cannot be read"):
        Columns(rows).mask(parse({"a": 1}), rows.rowids())


def test_a_failed_reading_leaves_the_columns_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows({"a": 1, "b": 2})
    columns = Columns(rows)
    columns.mask(parse({"a": 1}), rows.rowids())

    def fail(after: int = 0) -> Iterator[tuple[np.ndarray, list[str]]]:
        raise IndexStoreError("the disk failed")
        yield

    with monkeypatch.context() as patched:
        patched.setattr(rows, "metadata_blocks", fail)
        with pytest.raises(IndexStoreError, match="the disk failed"):
            columns.mask(parse({"b": 2}), rows.rowids())
        assert columns.mask(parse({"a": 1}), rows.rowids()).all()
    assert columns.mask(parse({"b": 2}), rows.rowids()).all()


def unit(count: int) -> np.ndarray:
    return np.tile(np.array([1, 0, 0, 0], dtype=np.float32), (count, 1))


def items(*values: int) -> list[Item]:
    return [Item(f"item {value}", metadata={"a": value, "odd": value % 2 == 1}) for value in values]


def test_a_collection_is_filtered_in_the_callers_snapshot(tmp_path: Path) -> None:
    filter = parse({"a": {"lt": 3}, "odd": True})
    with Collection.create(tmp_path / "pets", **MODEL) as collection:
        columns = Columns(collection)
        collection.upsert(items(*range(6)), unit(6))
        with collection.snapshot():
            before = collection.rowids()

            def write_and_load() -> None:
                collection.delete(["item 1"])
                collection.upsert(items(2, 7), unit(2))
                assert columns.mask(filter, collection.rowids()).sum() == 0

            thread = threading.Thread(target=write_and_load)
            thread.start()
            thread.join()
            assert columns.mask(filter, before).tolist() == [False, True, *[False] * 4]
        assert columns.mask(filter, collection.rowids()).sum() == 0
        collection.upsert(items(1), unit(1))
        assert columns.mask(filter, collection.rowids()).tolist() == [*[False] * 5, False, True]


def test_many_threads_filter_a_collection_while_it_changes(tmp_path: Path) -> None:
    errors: list[BaseException] = []
    done = threading.Event()
    filters = [{"a": {"lt": 50}}, {"odd": True}, {"a": {"gte": 20}, "odd": False}, {"b": {"ne": 1}}]
    with Collection.create(tmp_path / "pets", **MODEL) as collection:
        collection.upsert(items(*range(100)), unit(100))
        columns = Columns(collection)

        def ask(seed: int) -> None:
            generator = random.Random(seed)
            try:
                while not done.is_set():
                    filter = generator.choice(filters)
                    with collection.snapshot():
                        rowids = collection.rowids()
                        mask = columns.mask(parse(filter), rowids)
                        found = collection.items_of(rowids)
                    for rowid, holds in zip(rowids.tolist(), mask.tolist(), strict=True):
                        assert holds == expected(filter, found[rowid].metadata)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        generator = random.Random(0)
        for _ in range(20):
            collection.upsert(items(*generator.sample(range(150), 10)), unit(10))
            collection.delete([f"item {i}" for i in generator.sample(range(150), 5)])
            columns = Columns(collection) if generator.random() < 0.05 else columns
        done.set()
        for thread in threads:
            thread.join()
    assert not errors, errors[0]
