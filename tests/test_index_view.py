from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest

from index import cache
from index import view as view_module
from index.backends import torch_exact
from index.backends.faiss_cpu import FaissBackend
from index.backends.scan import ScanBackend
from index.build import build
from index.collection import Collection
from index.columns import Columns
from index.filters import Filter, parse
from index.items import Item
from index.view import Base, Rows, View

DIM = 16


def unit(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write(collection: Collection, numbers: range, seed: int = 0) -> None:
    items = [Item(f"{i}", metadata={"n": i}) for i in numbers]
    collection.upsert(items, unit(len(items), seed))


@pytest.fixture
def collection(tmp_path: Path) -> Iterator[Collection]:
    """A hundred items with an exact index, then ten more."""
    path = tmp_path / "pets"
    with Collection.create(path, fingerprint="a" * 64, model_name="t", embed_dim=DIM) as made:
        write(made, range(100))
        build(made, kind="exact")
        write(made, range(100, 110))
        yield made


def load(collection: Collection) -> View:
    with collection.snapshot() as generation:
        return View.load(collection, "image", "cpu", generation)


def advance(view: View, collection: Collection) -> View:
    with collection.snapshot() as generation:
        return view.advance(collection, generation)


class CountedColumns(Columns):
    def __init__(self, collection: Collection) -> None:
        super().__init__(collection)
        self.asked: list[int] = []

    def mask(self, filter: Filter, rowids: np.ndarray) -> np.ndarray:
        self.asked.append(len(rowids))
        return super().mask(filter, rowids)


def base(view: View) -> Base:
    assert view.base is not None
    return view.base


def test_a_view_is_the_index_and_what_was_written_since(collection: Collection) -> None:
    view = load(collection)
    assert (len(base(view)), view.live.count, len(view.fresh)) == (100, 100, 10)
    assert view.live.mask is None
    assert (view.generation, view.last_rowid, len(view)) == (2, 110, 110)


def test_deletes_leave_earlier_views_as_they_were(collection: Collection) -> None:
    old = load(collection)
    collection.delete(["3", "105"])
    middle = advance(old, collection)
    collection.delete(["4"])
    write(collection, range(5, 7), seed=1)
    new = advance(middle, collection)
    assert (len(old), len(middle), len(new)) == (110, 108, 107)
    assert old.live.mask is None
    assert middle.live.mask is not None
    assert np.flatnonzero(~middle.live.mask).tolist() == [3]
    assert new.live.mask is not None
    assert np.flatnonzero(~new.live.mask).tolist() == [3, 4, 5, 6]
    assert new.fresh.rowids.tolist() == [101, 102, 103, 104, 105, 107, 108, 109, 110, 111, 112]
    assert base(new) is base(old)
    loaded = load(collection)
    assert loaded.live.mask is not None
    assert (loaded.live.mask == new.live.mask).all()
    assert (loaded.fresh.rowids == new.fresh.rowids).all()


def test_a_view_far_behind_is_brought_forward_and_keeps_its_index(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.collection.REMEMBERED_WRITES", 2)
    old = load(collection)
    collection.delete(["3", "105"])
    for number in range(4, 7):
        write(collection, range(number, number + 1), seed=1)
    new, loaded = advance(old, collection), load(collection)
    assert base(new) is base(old)
    assert new.live.mask is not None
    assert loaded.live.mask is not None
    assert np.flatnonzero(~new.live.mask).tolist() == [3, 4, 5, 6]
    assert (loaded.live.mask == new.live.mask).all()
    assert (loaded.fresh.rowids == new.fresh.rowids).all()
    assert (len(new), new.last_rowid) == (108, loaded.last_rowid)


def test_an_index_that_misses_rows_is_ignored(
    collection: Collection, caplog: pytest.LogCaptureFixture
) -> None:
    info = cache.read_info(collection.path)
    assert info is not None
    with (
        collection.snapshot(),
        cache.Writer(collection.path, "image", DIM, collection.dtype) as writer,
    ):
        for rowids, vectors in collection.vector_blocks():
            writer.append(np.delete(rowids[:100], 50), np.delete(vectors[:100], 50, axis=0))
        writer.finish()
        writer.commit(type(info)(**{**vars(info), "count": 99}), None)
    view = load(collection)
    assert "vectors are missing in it" in caplog.text
    assert view.base is None
    assert len(view) == 110


def test_vectors_and_ids_are_of_the_index_and_of_fresh_rows_alike(collection: Collection) -> None:
    view = load(collection)
    rowids = np.array([1, 100, 101, 110, 7, 105])
    assert (view.vectors_of(rowids) == collection.vectors_of(rowids)).all()
    assert (view.vectors_of(rowids[:2]) == collection.vectors_of(rowids[:2])).all()
    assert (view.vectors_of(rowids[2:4]) == collection.vectors_of(rowids[2:4])).all()
    assert view.ids_of(rowids, collection) == ["0", "99", "100", "109", "6", "104"]


def test_an_id_that_was_not_read_in_time_is_asked_for_in_the_snapshot(
    collection: Collection,
) -> None:
    with collection.snapshot() as generation:
        view = View.load(collection, "image", "cpu", generation)
        with Collection.open(collection.path) as other:
            other.delete(["6"])
            assert base(view).ids(other).at(np.array([5, 6])) == ["5", ""]
        assert view.ids_of(np.array([6, 7]), collection) == ["5", "6"]
    assert view.ids_of(np.array([6, 7]), collection) == ["5", ""]


def test_what_a_filter_matches_is_remembered_and_only_shrinks(collection: Collection) -> None:
    columns = CountedColumns(collection)
    odd = parse({"n": {"in": list(range(1, 200, 2))}})
    view = load(collection)
    for _ in range(2):
        chosen = view.select(odd, columns)
        assert (chosen.base.count, chosen.num_fresh, len(chosen)) == (50, 5, 55)
    collection.delete(["1", "2", "101"])
    view = advance(view, collection)
    chosen = view.select(odd, columns)
    assert (chosen.base.count, chosen.num_fresh) == (49, 4)
    assert columns.asked == [100, 10, 10, 9]  # the index's rows once
    assert view.select(None, columns) == type(chosen)(view.live, None, 9)


def test_what_a_filter_matched_later_is_not_used_for_an_earlier_view(
    collection: Collection,
) -> None:
    columns = Columns(collection)
    low = parse({"n": {"lt": 3}})
    with collection.snapshot() as generation:
        old = View.load(collection, "image", "cpu", generation)
        with Collection.open(collection.path) as other:
            other.delete(["1"])
            with other.snapshot() as later:
                new = old.advance(other, later)
                assert new.select(low, Columns(other)).base.count == 2
        assert old.select(low, columns).base.count == 3
    assert new.select(low, columns).base.count == 2  # and the later one is what is kept


def test_few_filters_are_remembered(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_module, "_MASK_BYTES", 300)
    columns = CountedColumns(collection)
    filters = [parse({"n": {"lt": i}}) for i in range(4)]
    view = load(collection)
    for filter in (*filters, filters[3], filters[2], filters[1], filters[0]):
        view.select(filter, columns)
    assert columns.asked.count(100) == 5  # the first one again


def test_an_index_of_nothing_has_nothing_that_matches(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    with Collection.create(path, fingerprint="a" * 64, model_name="t", embed_dim=DIM) as made:
        build(made)
        view = load(made)
        assert len(base(view)) == 0
        odd = parse({"n": {"in": [1, 3]}})
        assert len(view.select(odd, Columns(made))) == 0
        write(made, range(4))
        assert len(advance(view, made).select(odd, Columns(made))) == 2


def test_without_an_index_all_vectors_go_to_the_gpu_if_they_have_room(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache.folder(collection.path, "image") / cache.INFO_FILE).unlink()
    monkeypatch.setattr(torch_exact, "on_gpus", lambda matrix, _: torch_exact.TorchBackend(matrix))
    with collection.snapshot() as generation:
        view = View.load(collection, "image", "cuda", generation)
    assert (len(base(view)), len(view.fresh)) == (110, 0)
    collection.delete(["5"])
    write(collection, range(110, 112))
    view = advance(view, collection)
    assert (view.live.count, len(view.fresh)) == (109, 2)
    monkeypatch.setattr(torch_exact, "on_gpus", lambda *_: None)
    with collection.snapshot() as generation:
        view = View.load(collection, "image", "cuda", generation)
    assert (view.base, len(view.fresh)) == (None, 111)


def test_a_row_is_located_wherever_numbers_are_missing() -> None:
    for rowids in (np.arange(5, 25), np.array([2, 3, 5, 8, 13, 21])):
        own = Base(rowids, unit(len(rowids)), ScanBackend(DIM))
        asked = np.arange(0, 30)
        places = own.locate(asked)
        assert places[np.isin(asked, rowids)].tolist() == list(range(len(rowids)))
        assert (places[~np.isin(asked, rowids)] == -1).all()
        assert own.places_of(asked).tolist() == list(range(len(rowids)))
    nothing = Base(np.zeros(0, np.int64), unit(0), ScanBackend(DIM))
    assert nothing.locate(np.array([1, 2])).tolist() == [-1, -1]


def test_what_part_is_chosen_near_a_query_is_the_least_of_the_nearest_lists() -> None:
    vectors = unit(400)
    index = faiss.index_factory(DIM, "IVF8,Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.train(vectors)
    index.add(vectors)
    own, queries = Base(np.arange(400), vectors, FaissBackend(index)), unit(5, seed=1)
    of_list = index.quantizer.search(vectors, 1)[1][:, 0]
    near = index.quantizer.search(queries, 3)[1]
    mask = ~np.isin(of_list, near[0, 0])  # of the first query's nearest list none is left
    shares = own.shares(Rows.of(mask), queries, 3, least=1)
    for share, lists in zip(shares, near, strict=True):
        parts = [mask[np.isin(of_list, lists[:i])].mean() for i in (1, 2, 3)]
        assert share == pytest.approx(min(parts))
    assert shares[0] == 0
    flat = Base(np.arange(400), vectors, ScanBackend(DIM))
    assert np.isnan(flat.shares(Rows.of(mask), queries, 3, least=1)).all()
