import faiss
import numpy as np
import pytest

from index import rank
from index.backends.inverted import InvertedLists
from index.backends.scan import ScanBackend
from index.info import overfetch
from index.rank import best
from index.view import NO_ROWS, Base, Rows, Selection, View

DIM = 8
COUNT = 400


def unit(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Rough:
    """Scores that are off by up to `error` and says so, or not at all, and remembers the calls."""

    max_breadth = 64
    lists: InvertedLists | None = None

    def __init__(self, vectors: np.ndarray, error: float, is_exact: bool = True) -> None:
        self.vectors = vectors
        self.noise = np.random.default_rng(1).uniform(-error, error, len(vectors))
        self.error = error if is_exact else np.inf
        self.calls: list[tuple[int, int, bool]] = []

    def __len__(self) -> int:
        return len(self.vectors)

    def errors(self, queries: np.ndarray, last: np.ndarray) -> np.ndarray:
        return np.full(len(queries), self.error)

    def search(
        self, queries: np.ndarray, k: int, breadth: int, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        self.calls.append((k, breadth, mask is not None))
        scores = queries @ self.vectors.T + self.noise.astype(np.float32)
        if mask is not None:
            scores[:, ~mask] = -np.inf
        labels = np.argsort(-scores, axis=1)[:, :k]
        scores = np.take_along_axis(scores, labels, axis=1)
        return scores, np.where(scores > -np.inf, labels, -1)


def ids_of(rowids: np.ndarray) -> dict[int, str]:
    return {rowid: f"{10_000 - rowid}" for rowid in rowids.tolist()}  # against the rows' order


def make_view(backend: Rough, dead: list[int] | None = None, num_fresh: int = 0) -> View:
    rowids = np.arange(len(backend)) * 2 + 1
    base = Base(rowids, backend.vectors, backend)
    live = Rows(None, len(backend)).without(np.array(dead or [], dtype=np.int64))
    fresh = ScanBackend(DIM)
    if num_fresh:
        fresh = fresh.append(np.arange(num_fresh) + 1000, unit(num_fresh, seed=7))
    return View(1, "image", 2000, base, live, fresh)


def everything(view: View) -> Selection:
    return Selection(view.live, None, len(view.fresh))


def check(view: View, queries: np.ndarray, count: int) -> None:
    """Against all live vectors at once, in float64."""
    assert view.base is not None
    rowids = np.concatenate([view.base.rowids[view.live.places], view.fresh.rowids])
    vectors = view.vectors_of(rowids).astype(np.float64)
    found = best(view, everything(view), queries, count, ids_of)
    scores = (queries @ vectors.T).clip(-1, 1).astype(np.float32)
    for row in range(len(queries)):
        keys = zip((-scores[row]).tolist(), rowids.tolist(), strict=True)
        expected = sorted((score, f"{10_000 - rowid}", rowid) for score, rowid in keys)[:count]
        assert found.rowids[row].tolist() == [rowid for *_, rowid in expected]
        assert found.scores[row].tolist() == pytest.approx([-s for s, *_ in expected], abs=1e-7)


@pytest.fixture(autouse=True)
def no_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "SCAN_ROWS", 0)


@pytest.mark.parametrize("error", [1e-6, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("dead", [[], list(range(0, 12)), list(range(0, 300))])
def test_the_best_are_found_however_rough_a_backend_is_as_long_as_it_says_so(
    error: float, dead: list[int]
) -> None:
    backend = Rough(unit(COUNT), error)
    for count in (1, 5, 30, 1000):
        check(make_view(backend, dead, num_fresh=30), unit(20, seed=3).astype(np.float64), count)


def test_without_its_error_they_would_not_be() -> None:
    backend = Rough(unit(COUNT), 0.3)
    backend.error = 0.0
    with pytest.raises(AssertionError):
        check(make_view(backend), unit(20, seed=3).astype(np.float64), 5)


def test_only_the_queries_that_need_it_are_searched_farther() -> None:
    vectors = unit(COUNT)
    vectors[:100] = vectors[0]  # of which none can be told from another
    backend = Rough(vectors, 1e-6)
    queries = np.stack([vectors[0], -vectors[0]]).astype(np.float64)
    check(make_view(backend), queries, 5)
    assert [k for k, *_ in backend.calls] == [overfetch(5), 4 * overfetch(5)]


def test_few_dead_are_met_and_many_are_masked() -> None:
    backend = Rough(unit(COUNT), 1e-6)
    query = -backend.vectors[:1].astype(np.float64)
    check(make_view(backend, list(range(10))), query, 5)
    assert backend.calls == [(27, 64, False)]  # 26 at 390 of 400
    check(make_view(backend, list(range(100))), query, 5)
    assert backend.calls[1:] == [(26, 64, True)]


class Passing(Rough):
    """An index that knows of no bound, and was tuned to what it is asked for."""

    def __init__(self, vectors: np.ndarray) -> None:
        super().__init__(vectors, 0.0, is_exact=False)


def make_tuned(backend: Rough, dead: list[int]) -> View:
    view = make_view(backend, dead)
    assert view.base is not None
    view.base.plan = lambda count, share: (8, 4 * count)  # type: ignore[method-assign]
    return view


def test_where_the_dead_are_all_that_is_near_the_search_goes_farther() -> None:
    vectors = unit(COUNT)
    query = unit(1, seed=3).astype(np.float64)
    near = np.argsort(-(vectors @ query[0]))
    backend = Passing(vectors)
    check(make_tuned(backend, near[:12].tolist()), query, 5)
    assert backend.calls == [(21, 8, False), (80, 32, True)]  # of 21 but 9 were alive
    backend = Passing(vectors)
    check(make_tuned(backend, near[-12:].tolist()), query, 5)
    assert backend.calls == [(21, 8, False)]


def test_an_index_that_comes_back_short_is_searched_farther_until_all_are_compared() -> None:
    class Short(Passing):
        def search(
            self, queries: np.ndarray, k: int, breadth: int, mask: np.ndarray | None = None
        ) -> tuple[np.ndarray, np.ndarray]:
            scores, labels = super().search(queries, k, breadth, mask)
            return scores[:, :4], np.where(np.arange(k) < 3, labels, -1)[:, :4]

    backend = Short(unit(COUNT))
    check(make_tuned(backend, []), unit(3, seed=3).astype(np.float64), 5)
    assert [breadth for _, breadth, _ in backend.calls] == [8, 32, 64]


@pytest.mark.parametrize("is_exact", [True, False])
def test_what_the_mask_leaves_out_is_no_hit_though_a_backend_overlooks_it(is_exact: bool) -> None:
    class Heedless(Rough):
        def search(
            self, queries: np.ndarray, k: int, breadth: int, mask: np.ndarray | None = None
        ) -> tuple[np.ndarray, np.ndarray]:
            return super().search(queries, k, breadth)

    vectors, queries = unit(COUNT), unit(3, seed=3).astype(np.float64)
    near = np.argsort(-(vectors @ queries[0]))
    for dead in (near[:200:2], near[:100], near[-100:]):
        backend = Heedless(vectors, 1e-6 if is_exact else 0, is_exact)
        check(make_view(backend, dead.tolist()), queries, 5)
        assert backend.calls


def test_where_a_filter_leaves_out_what_is_near_the_search_goes_on_while_it_gains() -> None:
    class Lists(Passing):
        """Looks at `breadth` rows by their nearness, and only then at the mask."""

        max_breadth = 10_000
        stray: int | None = None
        """a far row that is found among the near ones"""

        def search(
            self, queries: np.ndarray, k: int, breadth: int, mask: np.ndarray | None = None
        ) -> tuple[np.ndarray, np.ndarray]:
            self.calls.append((k, breadth, mask is not None))
            labels = np.argsort(-(queries @ self.vectors.T), axis=1)[:, :breadth]
            if self.stray is not None and breadth < 100:
                labels = np.append(labels[:, :-1], [[self.stray]], axis=1)
            scores = np.take_along_axis(queries @ self.vectors.T, labels, axis=1)
            if mask is not None:
                labels[~mask[labels]] = -1
            scores[labels < 0] = -np.inf
            order = np.argsort(-scores, axis=1)[:, :k]
            return np.take_along_axis(scores, order, 1), np.take_along_axis(labels, order, 1)

    vectors = unit(COUNT)
    query = unit(1, seed=3).astype(np.float64)
    near = np.argsort(-(vectors @ query[0]))
    backend = Lists(vectors)
    check(make_tuned(backend, near[-100:].tolist()), query, 5)
    assert [breadth for _, breadth, _ in backend.calls] == [8, 32]  # as good at once
    backend = Lists(vectors)
    backend.stray = int(near[-1])
    check(make_tuned(backend, near[4:28].tolist()), query, 5)  # four, a stray, and then the fifth
    assert [breadth for _, breadth, _ in backend.calls] == [8, 32, 128]
    backend.max_breadth = 32
    backend.calls.clear()
    check(make_tuned(backend, near[4:28].tolist()), query, 5)
    assert [breadth for _, breadth, _ in backend.calls] == [8, 32]  # there is no more


def test_a_filtered_search_of_lists_ends_where_the_filter_is_met_as_often_as_elsewhere() -> None:
    vectors = unit(COUNT)
    index = faiss.index_factory(DIM, "IVF20,Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.train(vectors)
    index.add(vectors)
    queries = unit(1, seed=3)
    scores = (vectors @ queries[0]).argsort()
    for dead, breadths in ((np.arange(0, COUNT, 2), [4]), (scores[-200:], [4, 16])):
        backend = Passing(vectors)
        backend.max_breadth, backend.lists = 20, InvertedLists(index)
        view = make_view(backend, dead.tolist())
        view.base.plan = lambda count, share: (4, 10)  # type: ignore[method-assign, union-attr]
        best(view, everything(view), queries.astype(np.float64), 5, ids_of)
        assert [breadth for _, breadth, _ in backend.calls] == breadths


def test_of_equal_rows_the_lowest_ids_are_taken_wherever_the_cut_falls() -> None:
    vectors = np.repeat(unit(20), 20, axis=0)
    for count in (1, 7, 20, 33):
        check(make_view(Rough(vectors, 1e-3)), vectors[::100].astype(np.float64), count)


def test_no_rows_and_no_queries_are_no_answers() -> None:
    view = make_view(Rough(unit(COUNT), 1e-6))
    nothing = Selection(NO_ROWS, None, 0)
    assert best(view, nothing, unit(3).astype(np.float64), 5, ids_of).rowids.shape == (3, 0)
    none = np.zeros((0, DIM))
    assert best(view, everything(view), none, 5, ids_of).rowids.shape == (0, 5)


def test_of_candidates_without_end_few_vectors_are_held_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank, "_VECTORS_AT_A_TIME", 40)
    monkeypatch.setattr(rank, "_FEW", 0)
    monkeypatch.setattr(rank, "_BLOCK_ROWS", 40)
    view = make_view(Rough(np.repeat(unit(1), COUNT, axis=0), 1e-6))
    assert view.base is not None
    taken: list[int] = []
    take = view.base.take

    def counted(places: np.ndarray) -> np.ndarray:
        taken.append(len(places))
        return take(places)

    monkeypatch.setattr(view.base, "take", counted)
    best(view, everything(view), unit(3, seed=3).astype(np.float64), 5, ids_of)
    assert sum(taken) > 3 * COUNT  # all are ties
    assert max(taken) <= 40


def test_a_scan_of_a_block_at_a_time_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "SCAN_ROWS", COUNT)
    backend = Rough(np.repeat(unit(COUNT // 2), 2, axis=0), 1e-6)
    view = make_view(backend, list(range(50, 250)))
    queries = unit(9, seed=3).astype(np.float64)
    for rows, scores in ((8192, 2**25), (7, 2**25), (64, 300)):
        monkeypatch.setattr(rank, "_BLOCK_ROWS", rows)
        monkeypatch.setattr(rank, "_SCORES_AT_A_TIME", scores)
        for count in (1, 10, 200):
            check(view, queries, count)
    assert backend.calls == []
