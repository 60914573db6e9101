"""What a search may ask for: filters, pages, thresholds, distinct hits, ids alone, a field; and
that scores are exact whatever is stored and searched."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from truths import DIM, Truth, clustered, unit

from clipserve.errors import FilterError, IndexStoreError
from index import rank
from index import search as search_module
from index.build import build
from index.collection import Collection
from index.filters import parse
from index.items import Item
from index.search import MAX_HITS, Hit, Searcher


@pytest.fixture
def truth(tmp_path: Path) -> Iterator[Truth]:
    made = Truth(tmp_path / "pets")
    yield made
    made.close()


@pytest.fixture
def float16_truth(tmp_path: Path) -> Iterator[Truth]:
    made = Truth(tmp_path / "half", "float16")
    yield made
    made.close()


KINDS = ["none", "exact", "IVF8,SQ8", "hnsw"]


@pytest.mark.parametrize("kind", KINDS)
def test_filters_agree_with_brute_force_through_every_kind_of_write(
    truth: Truth, kind: str
) -> None:
    """Of collections so small that no index is needed for the rows that match."""
    queries = unit(4, seed=9)
    truth.upsert([f"{i}" for i in range(900)], unit(900))
    if kind != "none":
        build(truth.collection, kind=kind, recall_target=1.1)
    searcher = truth.searcher()
    for _ in range(2):  # from the columns, then as they are remembered
        for below in (0, 1, 7, 400, 850, 999):
            truth.check(searcher, queries, 10, below)
        truth.delete([f"{i}" for i in range(100, 300)])
        truth.upsert([f"{i}" for i in range(100, 350)], unit(250, seed=1))
    truth.check(truth.searcher(), queries, 2000, 500)


@pytest.mark.parametrize("kind", ["IVF64,SQ8", "hnsw"])
def test_recall_is_kept_at_every_selectivity(
    truth: Truth, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(rank, "SCAN_ROWS", 20)  # wide enough is all above 2 %
    truth.upsert([f"{i}" for i in range(2000)], clustered(2000))
    build(truth.collection, kind=kind)
    searcher = truth.searcher()
    queries = clustered(2000)[:50] + 0.2 * unit(50, seed=5)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    for below in (999, 500, 100, 30, 10, 2, 1):
        assert truth.recall(searcher, queries, 10, below) >= 0.95
    truth.delete([f"{i}" for i in range(0, 2000, 3)])
    for below in (999, 100, 10, 1):
        assert truth.recall(searcher, queries, 10, below) >= 0.95


@pytest.mark.parametrize("kind", ["IVF64,SQ8", "hnsw"])
def test_recall_is_kept_where_a_filter_leaves_out_what_is_near(
    truth: Truth, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Queries of some clusters, for a category that has but strays there."""
    monkeypatch.setattr(rank, "SCAN_ROWS", 20)
    random = np.random.default_rng(0)
    clusters = random.integers(0, 40, 4000)
    vectors = unit(40, seed=1)[clusters] + 0.1 * random.standard_normal((4000, DIM))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    is_wanted = (clusters < 10) | (random.random(4000) < 0.004)
    order = np.argsort(~is_wanted, kind="stable")  # their number is what is filtered by
    for start in range(0, 4000, 1000):
        rows = order[start : start + 1000]
        wanted, others = rows[is_wanted[rows]], rows[~is_wanted[rows]]
        for block, number in ((wanted, 0), (others, 1)):
            write_numbered(truth, block, vectors[block], number)
    away = np.flatnonzero(clusters >= 10)[:300]
    build(truth.collection, kind=kind, queries=vectors[away])
    queries = vectors[away[::6]] + 0.02 * unit(50, seed=5)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    assert truth.recall(truth.searcher(), queries, 10, 1) >= 0.95


def write_numbered(truth: Truth, rows: np.ndarray, vectors: np.ndarray, number: int) -> None:
    ids = [f"{row}" for row in rows.tolist()]
    if ids:
        truth.collection.upsert([Item(id, metadata={"n": number}) for id in ids], vectors)
    truth.vectors |= dict(zip(ids, vectors, strict=True))
    truth.numbers |= dict.fromkeys(ids, number)


def test_few_matching_rows_are_scanned_and_no_index_is_asked(
    truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth.upsert([f"{i}" for i in range(900)], unit(900))
    build(truth.collection, kind="IVF8,SQ8")
    searcher = truth.searcher()

    def refuse(*_: object) -> None:
        raise AssertionError("the index was asked")

    monkeypatch.setattr("index.backends.faiss_cpu.FaissBackend.search", refuse)
    truth.check(searcher, unit(3, seed=3), 10, 300)


def test_a_filter_that_is_wrong_never_gets_here(truth: Truth) -> None:
    with pytest.raises(FilterError):
        parse({"n": {"around": 3}})


def test_pages_follow_one_another(truth: Truth) -> None:
    truth.upsert([f"{i:03d}" for i in range(100)], np.repeat(unit(50), 2, axis=0))  # all are ties
    searcher = truth.searcher()
    query = unit(2, seed=3)
    whole = searcher.search(query, 100)
    pages = [searcher.search(query, 7, offset=start) for start in range(0, 105, 7)]
    for row in range(2):
        assert [hit for page in pages for hit in page[row]] == whole[row]
    assert searcher.search(query, 5, offset=200) == [[], []]


def test_a_score_threshold_cuts_the_answer(truth: Truth) -> None:
    truth.upsert([f"{i}" for i in range(100)], unit(100))
    searcher = truth.searcher()
    (whole,) = searcher.search(unit(1, seed=3), 100)
    limit = whole[20].score
    assert searcher.search(unit(1, seed=3), 100, min_score=limit) == [whole[:21]]
    assert searcher.search(unit(1, seed=3), 5, min_score=limit, offset=18) == [whole[18:21]]
    assert searcher.search(unit(1, seed=3), 5, min_score=1.0) == [[]]
    assert searcher.search(unit(1, seed=3), 100, min_score=-1) == [whole]


def test_excluded_items_make_room_for_the_next(truth: Truth) -> None:
    truth.upsert([f"{i}" for i in range(100)], unit(100))
    searcher = truth.searcher()
    (whole,) = searcher.search(unit(1, seed=3), 100)
    exclude = [whole[i].id for i in (0, 3, 4, 50)] + ["unknown"]
    expected = [hit for hit in whole if hit.id not in exclude]
    for k in (1, 4, 60, 100):
        assert searcher.search(unit(1, seed=3), k, exclude=exclude) == [expected[:k]]
    assert searcher.search(unit(1, seed=3), 9, exclude=exclude, offset=3) == [expected[3:12]]


def test_an_excluded_item_that_is_replaced_meanwhile_stays_out(
    truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth.upsert([f"{i}" for i in range(100)], unit(100))
    build(truth.collection, kind="exact")
    searcher = truth.searcher()
    searcher.search(unit(1), 1, with_items=False)  # from here on it knows the ids of the index
    rowids_of = searcher.collection.rowids_of

    def replace_then_look(ids: Sequence[str]) -> dict[str, int]:
        truth.upsert(["5"], unit(100)[5:6])
        return rowids_of(ids)

    monkeypatch.setattr(searcher.collection, "rowids_of", replace_then_look)
    (hits,) = searcher.search(unit(100)[5:6], 3, exclude=["5"], with_items=False)
    assert "5" not in [hit.id for hit in hits]


def greedy(truth: Truth, query: np.ndarray, k: int, least: float) -> list[str]:
    kept: list[str] = []
    for _, id in truth.best(query, len(truth.vectors)):
        own = truth.vectors[id].astype(np.float64)
        own /= np.linalg.norm(own)
        others = np.array([truth.vectors[other] for other in kept], np.float64).reshape(-1, DIM)
        others /= np.linalg.norm(others, axis=1, keepdims=True)
        if not ((others @ own).astype(np.float32) >= least).any():
            kept.append(id)
    return kept[:k]


@pytest.mark.parametrize("kind", ["none", "IVF4,SQ8"])
@pytest.mark.parametrize("least", [1.0, 0.9, 0.3])
def test_near_duplicates_are_shown_once_and_others_instead(
    truth: Truth, kind: str, least: float
) -> None:
    vectors = np.repeat(unit(60), 20, axis=0)
    vectors[::2] += 0.02 * unit(600, seed=1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    truth.upsert([f"{i:04d}" for i in range(1000)], vectors[:1000])
    if kind != "none":
        build(truth.collection, kind=kind, recall_target=1.1)
    truth.upsert([f"{i:04d}" for i in range(1000, 1200)], vectors[1000:])
    searcher = truth.searcher()
    queries = unit(3, seed=3)
    answers = searcher.search(queries, 8, unique=least)
    expected = [greedy(truth, query, 8, least) for query in queries]
    assert [[hit.id for hit in hits] for hits in answers] == expected
    assert all(len(ids) == 8 for ids in expected) or least == 0.3
    pages = searcher.search(queries, 3, unique=least, offset=4)
    assert [[hit.id for hit in hits] for hits in pages] == [ids[4:7] for ids in expected]
    left_out = expected[0][:1]
    (hits,) = searcher.search(queries[:1], 2, unique=least, exclude=left_out, min_score=-1)
    assert left_out[0] not in [hit.id for hit in hits]


def test_of_many_equal_items_one_is_shown(truth: Truth) -> None:
    truth.upsert([f"{i}" for i in range(700)], np.repeat(unit(1), 700, axis=0))
    truth.upsert(["other"], -unit(1))
    (hits,) = truth.searcher().search(unit(1), 10, unique=0.99)
    assert [hit.id for hit in hits] == ["0", "other"]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"k": 1, "offset": -1}, "offset -1"),
        ({"k": 1, "offset": MAX_HITS}, f"at most {MAX_HITS}"),
        ({"k": MAX_HITS + 1}, f"at most {MAX_HITS}"),
        ({"min_score": np.nan}, "min_score nan"),
        ({"unique": 0.0}, "unique = 0"),
        ({"unique": 1.5}, "unique = 1.5"),
        ({"unique": np.nan}, "unique = nan"),
        ({"exclude": [f"{i}" for i in range(MAX_HITS + 1)]}, "10001 ids"),
    ],
)
def test_a_search_beyond_the_bounds_is_refused(
    truth: Truth, how: dict[str, Any], says: str
) -> None:
    with pytest.raises(IndexStoreError, match=says):
        truth.searcher().search(unit(1), **how)


def test_without_items_a_hit_is_an_id_and_a_score(
    truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth.upsert([f"{i}" for i in range(300)], unit(300))
    build(truth.collection, kind="exact")
    truth.upsert([f"{i}" for i in range(290, 310)], unit(20, seed=1))
    searcher = truth.searcher()
    whole = searcher.search(unit(5, seed=3), 50)
    monkeypatch.setattr(Collection, "items_of", None)
    found = searcher.search(unit(5, seed=3), 50, with_items=False)
    assert found == [[Hit(hit.id, hit.score) for hit in hits] for hits in whole]
    truth.delete([found[0][0].id])  # ids are known, and yet it is not found again
    assert searcher.search(unit(5, seed=3)[:1], 49, with_items=False) == [found[0][1:]]


def test_half_precision_scores_are_of_what_is_stored(
    float16_truth: Truth,
) -> None:
    truth = float16_truth
    truth.upsert([f"{i}" for i in range(300)], unit(300))
    with Searcher(truth.collection.path, device="cpu") as searcher:
        truth.check(searcher, unit(5, seed=3), 10)
        for kind in ("exact", "IVF4,SQ8"):
            build(truth.collection, kind=kind, recall_target=1.1)
            truth.upsert([f"{kind}-{i}" for i in range(5)], unit(5, seed=4))
            truth.check(searcher, unit(5, seed=3), 10)


def near_ties(count: int) -> np.ndarray:
    """Vectors whose cosines to the first axis differ by less than half precision can tell."""
    random = np.random.default_rng(0)
    vectors = np.zeros((count, DIM))
    vectors[:, 0] = 0.5 + 1e-5 * random.permutation(count) / count
    vectors[:, 1:] = random.standard_normal((count, DIM - 1))
    rest = np.linalg.norm(vectors[:, 1:], axis=1)
    vectors[:, 1:] *= (np.sqrt(1 - vectors[:, 0] ** 2) / rest)[:, None]
    return vectors.astype(np.float32)


def test_an_exact_search_is_exact_where_its_backend_cannot_tell(
    truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth.upsert([f"{i}" for i in range(3000)], near_ties(3000))
    monkeypatch.setattr("index.backends.torch_exact.computes_bf16", lambda _: True)
    build(truth.collection, kind="exact")
    searcher = truth.searcher()
    query = np.eye(DIM, dtype=np.float32)[:1]
    truth.check(searcher, query, 10)
    backend = searcher._view.base.backend
    assert backend.error > 1e-3
    monkeypatch.setattr(
        backend, "errors", lambda *_: 0.0
    )  # that it is looked at is what makes it right
    with pytest.raises(AssertionError):
        truth.check(searcher, query, 10)


def test_whoever_asks_for_ids_alone_does_not_wait_for_those_of_a_new_index(
    truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth.upsert([f"{i}" for i in range(300)], unit(300))
    build(truth.collection, kind="exact")
    searcher = truth.searcher()
    searcher.search(unit(1), 1, with_items=False)
    build(truth.collection, kind="IVF4,SQ8", recall_target=1.1)
    searcher.refresh()
    monkeypatch.setattr(Collection, "ids_of", None)
    (hits,) = searcher.search(unit(1, seed=3), 5, with_items=False)
    assert [hit.id for hit in hits] == [id for _, id in truth.best(unit(1, seed=3)[0], 5)]


def test_what_is_deleted_while_it_is_searched_is_not_found(
    truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth.upsert([f"{i}" for i in range(300)], unit(300))
    build(truth.collection, kind="exact")
    searcher = truth.searcher()
    query = unit(1, seed=3)
    doomed = [id for _, id in truth.best(query[0], 3)]
    best = rank.best

    def best_then_delete(*arguments: Any) -> Any:
        found = best(*arguments)
        if doomed[0] in truth.vectors:
            truth.delete(doomed)
            truth.upsert(["instead"], query)
        return found

    monkeypatch.setattr(search_module, "best", best_then_delete)
    truth.check(searcher, query, 10)
    assert searcher.search(query, 1)[0][0].id == "instead"


def test_the_text_vectors_are_searched_by_themselves(truth: Truth) -> None:
    axes = np.eye(DIM, dtype=np.float32)
    truth.collection.upsert([Item("picture")], axes[:1])
    truth.collection.upsert([Item("both")], axes[1:2], text_vectors=axes[2:3])
    truth.collection.upsert([Item("words")], None, text_vectors=axes[3:4])
    for _ in range(2):
        with Searcher(truth.collection.path, field="text", device="cpu") as searcher:
            (hits,) = searcher.search(axes[3:4], 10)
            assert [hit.id for hit in hits] == ["words", "both"]
            (hits,) = searcher.search(axes[2:3], 1)
            assert [hit.id for hit in hits] == ["both"]
        build(truth.collection, kind="exact", field="text")
    with pytest.raises(IndexStoreError, match="'sound'"):
        Searcher(truth.collection.path, field="sound", device="cpu")


def test_what_the_hits_hold_is_told_before_it_is_read(
    truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [Item(f"{i}", "\u00e9" * i, "s", {"n": i}) for i in range(10)]
    truth.collection.upsert(items, unit(10))
    searcher = truth.searcher()
    sizes = [2 * i + 1 + len(f'{{"n": {i}}}') for i in range(10)]
    told: list[int] = []
    hits = searcher.search(unit(3, seed=2), 4, admit=told.append)
    assert told == [sum(sizes[int(hit.id)] for own in hits for hit in own)]

    def refuse(size: int) -> None:
        raise ValueError(size)

    monkeypatch.setattr(searcher.collection, "items_of", None)
    with pytest.raises(ValueError, match=f"{told[0]}"):
        searcher.search(unit(3, seed=2), 4, admit=refuse)
    with pytest.raises(ValueError, match=f"{told[0]}"):
        searcher.search(unit(3, seed=2), 4, exclude=["none"], admit=refuse)
    assert len(searcher.search(unit(3, seed=2), 4, with_items=False, admit=refuse)) == 3


def test_what_is_told_of_hits_that_are_gone_is_taken_back(
    truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth.collection.upsert([Item(f"{i}") for i in range(10)], unit(10))
    searcher = truth.searcher()
    told: list[int] = []
    real = searcher.collection.items_of

    def gone_at_first(rowids: np.ndarray) -> dict[int, Item]:
        monkeypatch.setattr(searcher.collection, "items_of", real)
        return {}

    monkeypatch.setattr(searcher.collection, "items_of", gone_at_first)
    (hits,) = searcher.search(unit(1, seed=2), 4, admit=told.append)
    assert len(hits) == 4
    first, back, again = told
    assert (first + back, again) == (0, first)
