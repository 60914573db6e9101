import logging
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_index_collection import unwritable

from clipserve.errors import FilterError, IndexStoreError
from index import cache, rank
from index import search as search_module
from index.build import build
from index.collection import Collection
from index.filters import parse
from index.items import Item
from index.search import MAX_HITS, Hit, Searcher, SearchStats

ROOT = Path(__file__).resolve().parent.parent
DIM = 16


def unit(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def clustered(count: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((count // 20, DIM))[random.integers(0, count // 20, count)]
    vectors += 0.4 * random.standard_normal((count, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class Truth:
    """A collection beside a dictionary that says what must be found in it."""

    def __init__(self, path: Path, dtype: str = "float32") -> None:
        self.collection = Collection.create(
            path, fingerprint="a" * 64, model_name="tiny", embed_dim=DIM, dtype=dtype
        )
        self.vectors: dict[str, np.ndarray] = {}
        self.numbers: dict[str, int] = {}
        self._written = 0

    def upsert(self, ids: list[str], vectors: np.ndarray) -> None:
        numbers = range(self._written, self._written + len(ids))
        metadata = [{"of": id, "n": n % 1000} for id, n in zip(ids, numbers, strict=True)]
        items = [
            Item(id, f"about {id}", "here", own) for id, own in zip(ids, metadata, strict=True)
        ]
        self.collection.upsert(items, vectors)
        self.vectors |= dict(zip(ids, vectors.astype(self.collection.dtype), strict=True))
        self.numbers |= {id: n % 1000 for id, n in zip(ids, numbers, strict=True)}
        self._written += len(ids)

    def delete(self, ids: list[str]) -> None:
        self.collection.delete(ids)
        for id in ids:
            del self.vectors[id], self.numbers[id]

    def best(self, query: np.ndarray, k: int, below: int = 1000) -> list[tuple[float, str]]:
        """Of the items whose number is below that."""
        ids = np.array([id for id in sorted(self.vectors) if self.numbers[id] < below])
        vectors = np.array([self.vectors[id] for id in ids], dtype=np.float64).reshape(-1, DIM)
        query = query.astype(np.float64)
        scores = (vectors @ (query / np.linalg.norm(query))).clip(-1, 1).astype(np.float32)
        order = np.argsort(-scores, kind="stable")[:k]
        return [(float(scores[i]), str(ids[i])) for i in order]

    def check(self, searcher: Searcher, queries: np.ndarray, k: int, below: int = 1000) -> None:
        filter = None if below == 1000 else parse({"n": {"lt": below}})
        answers = searcher.search(queries, k, filter=filter)
        assert len(answers) == len(queries)
        for query, hits in zip(queries, answers, strict=True):
            expected = self.best(query, k, below)
            assert [hit.id for hit in hits] == [id for _, id in expected]
            assert np.allclose([h.score for h in hits], [s for s, _ in expected], atol=2e-7)

    def recall(self, searcher: Searcher, queries: np.ndarray, k: int, below: int = 1000) -> float:
        """Also checks that every hit is alive, matches, and has its exact score."""
        filter = None if below == 1000 else parse({"n": {"lt": below}})
        found = expected = 0
        for query, hits in zip(queries, searcher.search(queries, k, filter=filter), strict=True):
            best = {id for _, id in self.best(query, k, below)}
            found += len({hit.id for hit in hits} & best)
            expected += len(best)
            assert len({hit.id for hit in hits}) == len(hits) == len(best)
            assert all(self.numbers[hit.id] < below for hit in hits)
            scores = [float(self.vectors[hit.id].astype(np.float64) @ query) for hit in hits]
            assert np.allclose([hit.score for hit in hits], scores, atol=1e-6)
            assert scores == sorted(scores, reverse=True)
        return found / expected


@pytest.fixture
def truth(tmp_path: Path) -> Iterator[Truth]:
    made = Truth(tmp_path / "pets")
    yield made
    made.collection.close()


@pytest.fixture
def float16_truth(tmp_path: Path) -> Iterator[Truth]:
    made = Truth(tmp_path / "half", "float16")
    yield made
    made.collection.close()


@pytest.fixture
def open_searcher(truth: Truth) -> Iterator[Callable[[], Searcher]]:
    opened: list[Searcher] = []

    def open_one() -> Searcher:
        opened.append(Searcher(truth.collection.path, fingerprint="a" * 64, device="cpu"))
        return opened[-1]

    yield open_one
    for searcher in opened:
        searcher.close()


Opener = Callable[[], Searcher]


def test_search_agrees_with_brute_force_through_every_kind_of_write(
    truth: Truth, open_searcher: Opener
) -> None:
    searcher = open_searcher()
    queries = unit(8, seed=9)
    truth.check(searcher, queries, 5)  # empty
    truth.upsert([f"{i}" for i in range(300)], unit(300))
    truth.check(searcher, queries, 5)
    truth.upsert([f"{i}" for i in range(100, 400)], unit(300, seed=1))
    truth.check(searcher, queries, 10)
    truth.delete([f"{i}" for i in range(0, 400, 3)])
    truth.check(searcher, queries, 10)
    truth.upsert(["0", "1"], unit(2, seed=2))
    for k in (1, 200, len(truth.vectors), 10_000):
        truth.check(searcher, queries, k)
    truth.check(open_searcher(), queries, 50)


def test_search_agrees_with_brute_force_beside_an_index_that_misses_nothing(
    truth: Truth, open_searcher: Opener
) -> None:
    truth.upsert([f"{i}" for i in range(600)], unit(600))
    build(truth.collection, kind="IVF8,SQ8", recall_target=1.1)  # all lists are searched
    searcher = open_searcher()
    queries = unit(8, seed=9)
    truth.check(searcher, queries, 10)
    truth.upsert([f"{i}" for i in range(500, 700)], unit(200, seed=1))
    truth.delete([f"{i}" for i in range(0, 400)])
    truth.check(searcher, queries, 10)
    truth.check(searcher, queries, 10_000)
    truth.check(open_searcher(), queries, 100)


def test_a_hit_carries_what_is_known_of_the_item(truth: Truth, open_searcher: Opener) -> None:
    truth.upsert(["a"], unit(1))
    assert open_searcher().search(unit(1) * 3, 5) == [
        [Hit("a", 1.0, "about a", "here", {"of": "a", "n": 0})]
    ]


def test_equal_scores_are_ordered_by_id_wherever_the_cut_falls(
    truth: Truth, open_searcher: Opener
) -> None:
    ids = [f"{i:03d}" for i in np.random.default_rng(0).permutation(500)]
    truth.upsert(ids, np.repeat(unit(1), 500, axis=0))
    truth.upsert([f"x{i}" for i in range(200)], unit(200, seed=1))
    searcher = open_searcher()
    for k in (1, 10, 333, 600):
        truth.check(searcher, unit(1), k)
    truth.delete(["000", "001", "250"])
    truth.upsert(["002"], unit(1))  # now the newest row
    truth.check(searcher, unit(1), 10)


def test_an_empty_collection_and_no_queries_give_empty_lists(
    truth: Truth, open_searcher: Opener
) -> None:
    assert open_searcher().search(unit(3), 10) == [[], [], []]
    truth.upsert(["a"], unit(1))
    assert open_searcher().search(np.zeros((0, DIM)), 10) == []


@pytest.mark.parametrize(
    ("query", "k", "says"),
    [
        (np.ones((1, DIM + 1)), 1, r"\(1, 17\); collection 'pets' needs \(number of queries, 16\)"),
        (np.ones(DIM), 1, r"\(16,\)"),
        (np.zeros((1, DIM)), 1, "zero or not finite"),
        (np.full((1, DIM), np.nan), 1, "zero or not finite"),
        (np.full((1, DIM), np.inf), 1, "zero or not finite"),
        (np.ones((1, DIM)), 0, "k = 0"),
    ],
)
def test_a_query_without_an_answer_is_refused(
    open_searcher: Opener, query: np.ndarray, k: int, says: str
) -> None:
    with pytest.raises(IndexStoreError, match=says):
        open_searcher().search(query, k)


def test_another_model_is_refused_naming_both(truth: Truth) -> None:
    with pytest.raises(IndexStoreError, match=f"'tiny'.*{'a' * 12}, not by .* {'b' * 12}"):
        Searcher(truth.collection.path, fingerprint="b" * 64)


@pytest.mark.parametrize("kind", ["IVF256,SQ8", "IVF256,Flat"])
def test_an_index_finds_what_it_promised_with_exact_scores(
    truth: Truth, open_searcher: Opener, kind: str
) -> None:
    truth.upsert([f"{i}" for i in range(3000)], clustered(3000))
    info = build(truth.collection, kind=kind)
    searcher = open_searcher()
    assert searcher.info == info
    assert info.tuned[10]["breadth"] < 64
    queries = clustered(3000)[:100] + 0.2 * unit(100, seed=5)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    assert truth.recall(searcher, queries, 10) >= 0.95
    queries = queries[:30]
    truth.upsert([f"{i}" for i in range(2500, 3500)], clustered(1000, seed=1))
    truth.delete([f"{i}" for i in range(0, 3000, 2)])
    assert truth.recall(searcher, queries, 10) >= 0.95
    assert truth.recall(searcher, queries[:5], 1500) >= 0.95


def test_k_is_filled_even_when_nearly_all_of_the_index_is_deleted(
    truth: Truth, open_searcher: Opener
) -> None:
    truth.upsert([f"{i}" for i in range(1000)], unit(1000))
    build(truth.collection, kind="IVF16,Flat", recall_target=0.1)
    searcher = open_searcher()
    truth.delete([f"{i}" for i in range(980)])
    assert truth.recall(searcher, unit(5, seed=3), 20) == 1


def test_the_next_best_are_found_when_all_the_nearest_are_deleted(
    truth: Truth, open_searcher: Opener
) -> None:
    truth.upsert([f"{i}" for i in range(1000)], unit(1000))
    build(truth.collection, kind="IVF8,Flat", recall_target=1.1)
    searcher = open_searcher()
    query = unit(1, seed=3)
    truth.delete([id for _, id in truth.best(query[0], 100)])
    truth.upsert([f"new-{i}" for i in range(50)], unit(50, seed=4))
    truth.check(searcher, query, 10)


def test_a_new_index_is_taken_up_by_the_next_search(truth: Truth, open_searcher: Opener) -> None:
    truth.upsert([f"{i}" for i in range(1000)], clustered(1000))
    searcher = open_searcher()
    assert searcher.info is None
    first = build(truth.collection, kind="IVF16,SQ8")
    truth.delete(["5", "6"])
    truth.check(searcher, clustered(1000)[:3], 1)
    assert searcher.info == first
    second = build(truth.collection)
    truth.check(searcher, clustered(1000)[:3], 10)
    assert searcher.info == second


def damage_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("kind", ["faiss", "vectors", "rows"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [(damage_bit, "sha256"), (truncate, "sha256"), (Path.unlink, "gone")],
)
def test_a_damaged_index_is_named_and_answers_stay_right(
    truth: Truth,
    open_searcher: Opener,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
    says: str,
    kind: str,
) -> None:
    truth.upsert([f"{i}" for i in range(500)], unit(500))
    info = build(truth.collection, kind="IVF16,SQ8", recall_target=0.1)
    file = cache.folder(truth.collection.path, "image") / info.files[kind]["name"]
    damage(file)
    with caplog.at_level(logging.WARNING):
        searcher = open_searcher()
    assert file.name in caplog.text
    assert says in caplog.text
    assert searcher.info is None
    truth.check(searcher, unit(5, seed=3), 10)


def test_an_index_of_another_collection_or_model_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for model, says in (("a" * 64, "another collection"), ("b" * 64, "another model")):
        path = tmp_path / model[:1]
        with Collection.create(path, fingerprint=model, model_name="t", embed_dim=DIM) as old:
            old.upsert([Item(f"{i}") for i in range(500)], unit(500))
            build(old, kind="IVF16,SQ8")
        for file in path.glob("collection.sqlite3*"):
            file.unlink()
        truth = Truth(path)  # made anew, beside the index of the one before
        truth.upsert([f"{i}" for i in range(50)], unit(50, seed=1))
        with caplog.at_level(logging.WARNING), Searcher(path, device="cpu") as searcher:
            assert says in caplog.text
            truth.check(searcher, unit(5, seed=3), 10)
        truth.collection.close()


def test_a_searcher_far_behind_starts_anew(
    truth: Truth, open_searcher: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.collection.REMEMBERED_WRITES", 3)
    truth.upsert([f"{i}" for i in range(50)], unit(50))
    searcher = open_searcher()
    truth.check(searcher, unit(3, seed=3), 5)
    for i in range(20):
        truth.upsert([f"{i}"], unit(1, seed=i + 10))
        truth.delete([f"{i + 25}"])
    truth.check(searcher, unit(3, seed=3), 50)


def test_a_big_collection_without_an_index_is_scanned_and_says_so(
    truth: Truth,
    open_searcher: Opener,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(search_module, "EXACT_LIMIT", 100)
    truth.upsert([f"{i}" for i in range(101)], unit(101))
    with caplog.at_level(logging.WARNING):
        searcher = open_searcher()
    assert "101 vectors and no index" in caplog.text
    truth.check(searcher, unit(3, seed=3), 5)


def test_many_queries_and_candidates_are_answered_piece_by_piece(
    truth: Truth, open_searcher: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "_QUERIES_AT_A_TIME", 7)
    monkeypatch.setattr(rank, "_VECTORS_AT_A_TIME", 100)
    monkeypatch.setattr(rank, "_BLOCK_ROWS", 30)
    monkeypatch.setattr(rank, "_SCORES_AT_A_TIME", 500)
    truth.upsert([f"{i}" for i in range(400)], unit(400))
    truth.check(open_searcher(), unit(23, seed=3), 10)
    build(truth.collection, kind="IVF4,SQ8")
    truth.delete([f"{i}" for i in range(0, 400, 5)])  # few enough to be scanned
    truth.check(open_searcher(), unit(23, seed=3), 10)


def test_a_read_only_collection_can_be_searched() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        truth = Truth(Path(folder) / "pets")
        truth.upsert([f"{i}" for i in range(500)], unit(500))
        info = build(truth.collection, kind="IVF8,SQ8", recall_target=1.1)
        truth.collection.close()
        path = truth.collection.path
        with unwritable(path), Searcher(path, device="cpu") as searcher:
            assert searcher.info == info
            truth.check(searcher, unit(3, seed=3), 5)


WRITER = """
import sys
import numpy as np
from pathlib import Path
from typing import Any
from index.collection import Collection, Item
with Collection.open(Path(sys.argv[1])) as collection:
    vectors = np.eye(16, dtype=np.float32)
    for line in sys.stdin:
        i = int(line)
        collection.upsert([Item("moving", str(i)), Item(f"new-{i}")], vectors[[i % 16, 15]])
        collection.delete([f"new-{i - 1}"])
        sys.stdout.write("done\\n")
        sys.stdout.flush()
"""


def test_what_another_process_wrote_is_found_at_once(truth: Truth, open_searcher: Opener) -> None:
    searcher = open_searcher()
    axes = np.eye(DIM, dtype=np.float32)
    command = [sys.executable, "-c", WRITER, str(truth.collection.path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen(command, **pipes) as writer:
        for i in range(12):
            writer.stdin.write(f"{i}\n")
            writer.stdin.flush()
            assert writer.stdout.readline() == "done\n"
            hits = searcher.search(axes[[i, 15]], 10)
            assert [(h.id, h.caption) for h in hits[0]][0] == ("moving", str(i))
            assert {h.id for h in hits[1]} == {"moving", f"new-{i}"}
            if i == 6:
                build(truth.collection, kind="IVF1,Flat")
        writer.stdin.close()
        assert writer.wait() == 0


def test_threads_search_rightly_while_one_writes_and_indexes_are_swapped(
    truth: Truth, open_searcher: Opener
) -> None:
    """Items of group g lie along axis g; each write moves all of a group to the next axis.

    In every snapshot thus all ten of a group lie on one axis, and an answer that mixed two
    generations, or met an old version or a deleted item, would not.
    """
    axes = np.eye(DIM, dtype=np.float32)
    groups = [[f"{g}-{i}" for i in range(10)] for g in range(4)]
    for g, group in enumerate(groups):
        truth.upsert(group, axes[[4 * g] * 10])
    truth.upsert([f"far-{i}" for i in range(300)], -np.abs(unit(300)))
    searcher = open_searcher()
    done = threading.Event()
    wrong: list[object] = []
    searches = [0] * 3

    def look(worker: int) -> None:
        while not done.is_set() or searches[worker] < 20:
            answers = searcher.search(axes, 10)
            found = [sorted(h.id for h in hits if h.score == 1) for hits in answers]
            if sorted(ids for ids in found if ids) != groups:
                wrong.append(found)
                return
            searches[worker] += 1

    threads = [threading.Thread(target=look, args=(worker,)) for worker in range(3)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(36):
            g = turn % 4
            truth.upsert(groups[g], axes[[4 * g + (turn // 4 + 1) % 4] * 10])
            truth.delete([f"far-{turn}"])
            if turn % 9 == 8:
                build(truth.collection, kind=("IVF4,SQ8", "exact", "IVF4,Flat")[turn // 9 % 3])
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert min(searches) >= 20


KINDS = ["none", "exact", "IVF8,SQ8", "hnsw"]


@pytest.mark.parametrize("kind", KINDS)
def test_filters_agree_with_brute_force_through_every_kind_of_write(
    truth: Truth, open_searcher: Opener, kind: str
) -> None:
    """Of collections so small that no index is needed for the rows that match."""
    queries = unit(4, seed=9)
    truth.upsert([f"{i}" for i in range(900)], unit(900))
    if kind != "none":
        build(truth.collection, kind=kind, recall_target=1.1)
    searcher = open_searcher()
    for _ in range(2):  # from the columns, then as they are remembered
        for below in (0, 1, 7, 400, 850, 999):
            truth.check(searcher, queries, 10, below)
        truth.delete([f"{i}" for i in range(100, 300)])
        truth.upsert([f"{i}" for i in range(100, 350)], unit(250, seed=1))
    truth.check(open_searcher(), queries, 2000, 500)


@pytest.mark.parametrize("kind", ["IVF64,SQ8", "hnsw"])
def test_recall_is_kept_at_every_selectivity(
    truth: Truth, open_searcher: Opener, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(rank, "SCAN_ROWS", 20)  # wide enough is all above 2 %
    truth.upsert([f"{i}" for i in range(2000)], clustered(2000))
    build(truth.collection, kind=kind)
    searcher = open_searcher()
    queries = clustered(2000)[:50] + 0.2 * unit(50, seed=5)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    for below in (999, 500, 100, 30, 10, 2, 1):
        assert truth.recall(searcher, queries, 10, below) >= 0.95
    truth.delete([f"{i}" for i in range(0, 2000, 3)])
    for below in (999, 100, 10, 1):
        assert truth.recall(searcher, queries, 10, below) >= 0.95


@pytest.mark.parametrize("kind", ["IVF64,SQ8", "hnsw"])
def test_recall_is_kept_where_a_filter_leaves_out_what_is_near(
    truth: Truth, open_searcher: Opener, monkeypatch: pytest.MonkeyPatch, kind: str
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
    assert truth.recall(open_searcher(), queries, 10, 1) >= 0.95


def write_numbered(truth: Truth, rows: np.ndarray, vectors: np.ndarray, number: int) -> None:
    ids = [f"{row}" for row in rows.tolist()]
    if ids:
        truth.collection.upsert([Item(id, metadata={"n": number}) for id in ids], vectors)
    truth.vectors |= dict(zip(ids, vectors, strict=True))
    truth.numbers |= dict.fromkeys(ids, number)


def test_few_matching_rows_are_scanned_and_no_index_is_asked(
    truth: Truth, open_searcher: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth.upsert([f"{i}" for i in range(900)], unit(900))
    build(truth.collection, kind="IVF8,SQ8")
    searcher = open_searcher()

    def refuse(*_: object) -> None:
        raise AssertionError("the index was asked")

    monkeypatch.setattr("index.backends.faiss_cpu.FaissBackend.search", refuse)
    truth.check(searcher, unit(3, seed=3), 10, 300)


def test_a_filter_that_is_wrong_never_gets_here(truth: Truth) -> None:
    with pytest.raises(FilterError):
        parse({"n": {"around": 3}})


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
    truth: Truth, open_searcher: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth.upsert([f"{i}" for i in range(3000)], near_ties(3000))
    monkeypatch.setattr("index.backends.torch_exact.computes_bf16", lambda _: True)
    build(truth.collection, kind="exact")
    searcher = open_searcher()
    query = np.eye(DIM, dtype=np.float32)[:1]
    truth.check(searcher, query, 10)
    backend = searcher._view.base.backend
    assert backend.error > 1e-3
    monkeypatch.setattr(backend, "error", 0.0)  # that it is looked at is what makes it right
    with pytest.raises(AssertionError):
        truth.check(searcher, query, 10)


def test_pages_follow_one_another(truth: Truth, open_searcher: Opener) -> None:
    truth.upsert([f"{i:03d}" for i in range(100)], np.repeat(unit(50), 2, axis=0))  # all are ties
    searcher = open_searcher()
    query = unit(2, seed=3)
    whole = searcher.search(query, 100)
    pages = [searcher.search(query, 7, offset=start) for start in range(0, 105, 7)]
    for row in range(2):
        assert [hit for page in pages for hit in page[row]] == whole[row]
    assert searcher.search(query, 5, offset=200) == [[], []]


def test_a_score_threshold_cuts_the_answer(truth: Truth, open_searcher: Opener) -> None:
    truth.upsert([f"{i}" for i in range(100)], unit(100))
    searcher = open_searcher()
    (whole,) = searcher.search(unit(1, seed=3), 100)
    limit = whole[20].score
    assert searcher.search(unit(1, seed=3), 100, min_score=limit) == [whole[:21]]
    assert searcher.search(unit(1, seed=3), 5, min_score=limit, offset=18) == [whole[18:21]]
    assert searcher.search(unit(1, seed=3), 5, min_score=1.0) == [[]]
    assert searcher.search(unit(1, seed=3), 100, min_score=-1) == [whole]


def test_excluded_items_make_room_for_the_next(truth: Truth, open_searcher: Opener) -> None:
    truth.upsert([f"{i}" for i in range(100)], unit(100))
    searcher = open_searcher()
    (whole,) = searcher.search(unit(1, seed=3), 100)
    exclude = [whole[i].id for i in (0, 3, 4, 50)] + ["unknown"]
    expected = [hit for hit in whole if hit.id not in exclude]
    for k in (1, 4, 60, 100):
        assert searcher.search(unit(1, seed=3), k, exclude=exclude) == [expected[:k]]
    assert searcher.search(unit(1, seed=3), 9, exclude=exclude, offset=3) == [expected[3:12]]


def test_an_excluded_item_that_is_replaced_meanwhile_stays_out(
    truth: Truth, open_searcher: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth.upsert([f"{i}" for i in range(100)], unit(100))
    build(truth.collection, kind="exact")
    searcher = open_searcher()
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
    truth: Truth, open_searcher: Opener, kind: str, least: float
) -> None:
    vectors = np.repeat(unit(60), 20, axis=0)
    vectors[::2] += 0.02 * unit(600, seed=1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    truth.upsert([f"{i:04d}" for i in range(1000)], vectors[:1000])
    if kind != "none":
        build(truth.collection, kind=kind, recall_target=1.1)
    truth.upsert([f"{i:04d}" for i in range(1000, 1200)], vectors[1000:])
    searcher = open_searcher()
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


def test_of_many_equal_items_one_is_shown(truth: Truth, open_searcher: Opener) -> None:
    truth.upsert([f"{i}" for i in range(700)], np.repeat(unit(1), 700, axis=0))
    truth.upsert(["other"], -unit(1))
    (hits,) = open_searcher().search(unit(1), 10, unique=0.99)
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
    open_searcher: Opener, how: dict[str, Any], says: str
) -> None:
    with pytest.raises(IndexStoreError, match=says):
        open_searcher().search(unit(1), **how)


def test_without_items_a_hit_is_an_id_and_a_score(
    truth: Truth, open_searcher: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth.upsert([f"{i}" for i in range(300)], unit(300))
    build(truth.collection, kind="exact")
    truth.upsert([f"{i}" for i in range(290, 310)], unit(20, seed=1))
    searcher = open_searcher()
    whole = searcher.search(unit(5, seed=3), 50)
    monkeypatch.setattr(Collection, "items_of", None)
    found = searcher.search(unit(5, seed=3), 50, with_items=False)
    assert found == [[Hit(hit.id, hit.score) for hit in hits] for hits in whole]
    truth.delete([found[0][0].id])  # ids are known, and yet it is not found again
    assert searcher.search(unit(5, seed=3)[:1], 49, with_items=False) == [found[0][1:]]


def test_what_is_deleted_while_it_is_searched_is_not_found(
    truth: Truth, open_searcher: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth.upsert([f"{i}" for i in range(300)], unit(300))
    build(truth.collection, kind="exact")
    searcher = open_searcher()
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


def test_stats_say_what_a_search_goes_through(truth: Truth, open_searcher: Opener) -> None:
    searcher = open_searcher()
    assert searcher.stats() == SearchStats(0, 0, 0)
    truth.upsert([f"{i}" for i in range(100)], unit(100))
    assert searcher.stats() == SearchStats(0, 100, 0)
    build(truth.collection, kind="exact")
    searcher.refresh()
    assert searcher.stats() == SearchStats(100, 0, 0)
    truth.upsert([f"{i}" for i in range(95, 105)], unit(10))
    truth.delete(["0", "104"])
    assert searcher.stats() == SearchStats(100, 9, 6)


def test_watchers_hear_of_writes_once_they_are_noticed(truth: Truth, open_searcher: Opener) -> None:
    searcher = open_searcher()
    calls: list[int] = []
    searcher.watch(lambda: calls.append(1))
    searcher.search(unit(1))
    assert not calls
    truth.upsert(["a"], unit(1))
    searcher.search(unit(1))
    searcher.search(unit(1))
    assert len(calls) == 1


def test_while_an_index_is_being_taken_searches_go_on_with_the_old_one(
    truth: Truth, open_searcher: Opener
) -> None:
    truth.upsert([f"{i}" for i in range(100)], unit(100))
    first = build(truth.collection, kind="exact")
    searcher = open_searcher()

    def build_and_search() -> bool:
        build(truth.collection, kind="IVF4,SQ8", recall_target=1.1)
        truth.check(searcher, unit(3, seed=3), 5)
        assert searcher.info == first
        return True

    searcher.take_index(build_and_search)
    assert searcher.info is not None
    assert searcher.info.kind == "IVF4,SQ8"
    truth.check(searcher, unit(3, seed=3), 5)
