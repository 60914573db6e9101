import logging
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
from test_index_collection import unwritable
from truths import DIM, Truth, clustered, unit

from clipserve.errors import CollectionClosed, IndexStoreError
from index import cache, rank
from index import search as search_module
from index.acknowledged import ACKNOWLEDGED
from index.build import build
from index.collection import Collection
from index.items import Item
from index.search import Hit, Searcher, SearchStats

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def truth(tmp_path: Path) -> Iterator[Truth]:
    made = Truth(tmp_path / "pets")
    yield made
    made.close()


def test_search_agrees_with_brute_force_through_every_kind_of_write(truth: Truth) -> None:
    searcher = truth.searcher()
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
    truth.check(truth.searcher(), queries, 50)


def test_search_agrees_with_brute_force_beside_an_index_that_misses_nothing(truth: Truth) -> None:
    truth.upsert([f"{i}" for i in range(600)], unit(600))
    build(truth.collection, kind="IVF8,SQ8", recall_target=1.1)  # all lists are searched
    searcher = truth.searcher()
    queries = unit(8, seed=9)
    truth.check(searcher, queries, 10)
    truth.upsert([f"{i}" for i in range(500, 700)], unit(200, seed=1))
    truth.delete([f"{i}" for i in range(0, 400)])
    truth.check(searcher, queries, 10)
    truth.check(searcher, queries, 10_000)
    truth.check(truth.searcher(), queries, 100)


def test_a_hit_carries_what_is_known_of_the_item(truth: Truth) -> None:
    truth.upsert(["a"], unit(1))
    assert truth.searcher().search(unit(1) * 3, 5) == [
        [Hit("a", 1.0, "about a", "here", {"of": "a", "n": 0})]
    ]


def test_equal_scores_are_ordered_by_id_wherever_the_cut_falls(truth: Truth) -> None:
    ids = [f"{i:03d}" for i in np.random.default_rng(0).permutation(500)]
    truth.upsert(ids, np.repeat(unit(1), 500, axis=0))
    truth.upsert([f"x{i}" for i in range(200)], unit(200, seed=1))
    searcher = truth.searcher()
    for k in (1, 10, 333, 600):
        truth.check(searcher, unit(1), k)
    truth.delete(["000", "001", "250"])
    truth.upsert(["002"], unit(1))  # now the newest row
    truth.check(searcher, unit(1), 10)


def test_an_empty_collection_and_no_queries_give_empty_lists(truth: Truth) -> None:
    assert truth.searcher().search(unit(3), 10) == [[], [], []]
    truth.upsert(["a"], unit(1))
    assert truth.searcher().search(np.zeros((0, DIM)), 10) == []


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
    truth: Truth, query: np.ndarray, k: int, says: str
) -> None:
    with pytest.raises(IndexStoreError, match=says):
        truth.searcher().search(query, k)


def test_another_model_is_refused_naming_both(truth: Truth) -> None:
    with pytest.raises(IndexStoreError, match=f"'tiny'.*{'a' * 12}, not by .* {'b' * 12}"):
        Searcher(truth.collection.path, fingerprint="b" * 64)


@pytest.mark.parametrize("kind", ["IVF256,SQ8", "IVF256,Flat"])
def test_an_index_finds_what_it_promised_with_exact_scores(truth: Truth, kind: str) -> None:
    truth.upsert([f"{i}" for i in range(3000)], clustered(3000))
    info = build(truth.collection, kind=kind)
    searcher = truth.searcher()
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


def test_k_is_filled_even_when_nearly_all_of_the_index_is_deleted(truth: Truth) -> None:
    truth.upsert([f"{i}" for i in range(1000)], unit(1000))
    build(truth.collection, kind="IVF16,Flat", recall_target=0.1)
    searcher = truth.searcher()
    truth.delete([f"{i}" for i in range(980)])
    assert truth.recall(searcher, unit(5, seed=3), 20) == 1


def test_the_next_best_are_found_when_all_the_nearest_are_deleted(truth: Truth) -> None:
    truth.upsert([f"{i}" for i in range(1000)], unit(1000))
    build(truth.collection, kind="IVF8,Flat", recall_target=1.1)
    searcher = truth.searcher()
    query = unit(1, seed=3)
    truth.delete([id for _, id in truth.best(query[0], 100)])
    truth.upsert([f"new-{i}" for i in range(50)], unit(50, seed=4))
    truth.check(searcher, query, 10)


def test_a_new_index_is_taken_up_by_the_next_search(truth: Truth) -> None:
    truth.upsert([f"{i}" for i in range(1000)], clustered(1000))
    searcher = truth.searcher()
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
        searcher = truth.searcher()
    assert file.name in caplog.text
    assert says in caplog.text
    assert searcher.info is None
    truth.check(searcher, unit(5, seed=3), 10)


def test_an_index_that_cannot_be_loaded_leaves_the_one_in_use(
    truth: Truth, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    truth.upsert([f"{i}" for i in range(1000)], clustered(1000))
    first = build(truth.collection, kind="IVF16,SQ8", recall_target=1.1)
    searcher = truth.searcher()
    truth.upsert(["new"], unit(1, seed=1))
    build(truth.collection, kind="IVF8,SQ8")
    tried: list[None] = []

    def full(*_: object) -> None:
        tried.append(None)
        raise MemoryError("no room for both")

    with monkeypatch.context() as patch:
        patch.setattr("index.view.make_backend", full)
        for _ in range(3):
            truth.check(searcher, unit(5, seed=3), 10)
    assert len(tried) == 1
    assert "searches go on with the old one" in caplog.text
    assert searcher.info == first
    third = build(truth.collection, kind="IVF8,SQ8", recall_target=1.1)
    truth.check(searcher, unit(5, seed=3), 10)
    assert searcher.info == third


def test_an_index_of_another_collection_or_model_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for model, says in (("a" * 64, "another collection"), ("b" * 64, "another model")):
        path = tmp_path / model[:1]
        with Collection.create(path, fingerprint=model, model_name="t", embed_dim=DIM) as old:
            old.upsert([Item(f"{i}") for i in range(500)], unit(500))
            build(old, kind="IVF16,SQ8")
        for file in (*path.glob("collection.sqlite3*"), path / ACKNOWLEDGED):
            file.unlink()
        truth = Truth(path)  # made anew, beside the index of the one before
        truth.upsert([f"{i}" for i in range(50)], unit(50, seed=1))
        with caplog.at_level(logging.WARNING), Searcher(path, device="cpu") as searcher:
            assert says in caplog.text
            truth.check(searcher, unit(5, seed=3), 10)
        truth.collection.close()


def test_a_searcher_far_behind_starts_anew(truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.collection.REMEMBERED_WRITES", 3)
    truth.upsert([f"{i}" for i in range(50)], unit(50))
    searcher = truth.searcher()
    truth.check(searcher, unit(3, seed=3), 5)
    for i in range(20):
        truth.upsert([f"{i}"], unit(1, seed=i + 10))
        truth.delete([f"{i + 25}"])
    truth.check(searcher, unit(3, seed=3), 50)


def test_a_big_collection_without_an_index_is_scanned_and_says_so(
    truth: Truth,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(search_module, "EXACT_LIMIT", 100)
    truth.upsert([f"{i}" for i in range(101)], unit(101))
    with caplog.at_level(logging.WARNING):
        searcher = truth.searcher()
    assert "101 vectors and no index" in caplog.text
    truth.check(searcher, unit(3, seed=3), 5)


def test_many_queries_and_candidates_are_answered_piece_by_piece(
    truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "_QUERIES_AT_A_TIME", 7)
    monkeypatch.setattr(rank, "_VECTORS_AT_A_TIME", 100)
    monkeypatch.setattr(rank, "_BLOCK_ROWS", 30)
    monkeypatch.setattr(rank, "_SCORES_AT_A_TIME", 500)
    truth.upsert([f"{i}" for i in range(400)], unit(400))
    truth.check(truth.searcher(), unit(23, seed=3), 10)
    build(truth.collection, kind="IVF4,SQ8")
    truth.delete([f"{i}" for i in range(0, 400, 5)])  # few enough to be scanned
    truth.check(truth.searcher(), unit(23, seed=3), 10)


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


def test_what_another_process_wrote_is_found_at_once(truth: Truth) -> None:
    searcher = truth.searcher()
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


def test_threads_search_rightly_while_one_writes_and_indexes_are_swapped(truth: Truth) -> None:
    """Items of group g lie along axis g; each write moves all of a group to the next axis.

    In every snapshot thus all ten of a group lie on one axis, and an answer that mixed two
    generations, or met an old version or a deleted item, would not.
    """
    axes = np.eye(DIM, dtype=np.float32)
    groups = [[f"{g}-{i}" for i in range(10)] for g in range(4)]
    for g, group in enumerate(groups):
        truth.upsert(group, axes[[4 * g] * 10])
    truth.upsert([f"far-{i}" for i in range(300)], -np.abs(unit(300)))
    searcher = truth.searcher()
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


def test_stats_say_what_a_search_goes_through(truth: Truth) -> None:
    searcher = truth.searcher()
    assert searcher.stats() == SearchStats(0, 0, 0)
    truth.upsert([f"{i}" for i in range(100)], unit(100))
    assert searcher.stats() == SearchStats(0, 100, 0)
    build(truth.collection, kind="exact")
    searcher.refresh()
    assert searcher.stats() == SearchStats(100, 0, 0)
    truth.upsert([f"{i}" for i in range(95, 105)], unit(10))
    truth.delete(["0", "104"])
    assert searcher.stats() == SearchStats(100, 9, 6)


def test_watchers_hear_of_writes_once_they_are_noticed(truth: Truth) -> None:
    searcher = truth.searcher()
    calls: list[int] = []
    searcher.watch(lambda: calls.append(1))
    searcher.search(unit(1))
    assert not calls
    truth.upsert(["a"], unit(1))
    searcher.search(unit(1))
    searcher.search(unit(1))
    assert len(calls) == 1


def test_while_an_index_is_being_taken_searches_go_on_with_the_old_one(truth: Truth) -> None:
    truth.upsert([f"{i}" for i in range(100)], unit(100))
    first = build(truth.collection, kind="exact")
    searcher = truth.searcher()

    def build_and_search() -> bool:
        build(truth.collection, kind="IVF4,SQ8", recall_target=1.1)
        truth.check(searcher, unit(3, seed=3), 5)
        assert searcher.info == first
        return True

    searcher.take_index(build_and_search)
    assert searcher.info is not None
    assert searcher.info.kind == "IVF4,SQ8"
    truth.check(searcher, unit(3, seed=3), 5)


def test_closing_waits_for_an_index_that_is_being_loaded(
    truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth.upsert([f"{i}" for i in range(50)], unit(50))
    searcher = Searcher(truth.collection.path, device="cpu")
    entered, go_on = threading.Event(), threading.Event()
    load = searcher._load

    def held(generation: int) -> object:
        entered.set()
        assert go_on.wait(60)
        return load(generation)

    monkeypatch.setattr(searcher, "_load", held)
    with ThreadPoolExecutor(2) as pool:
        taking = pool.submit(searcher.take_index, lambda: True)
        assert entered.wait(60)
        closing = pool.submit(searcher.close)
        assert wait([closing], 0.05).not_done
        go_on.set()
        taking.result()
        closing.result()
    with pytest.raises(CollectionClosed):
        searcher.take_index(lambda: True)
