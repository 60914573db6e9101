import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from truths import Truth, unit

from clipserve.errors import IndexStoreError
from index import cache, maintain
from index.build import build
from index.collection import directory_lock
from index.maintain import Maintainer
from index.search import Searcher, SearchStats

LONG_S = 60.0  # for what happens at once, or never


@pytest.fixture
def truth(tmp_path: Path) -> Iterator[Truth]:
    made = Truth(tmp_path / "pets")
    made.upsert([f"{i}" for i in range(200)], unit(200))
    build(made.collection, kind="exact")
    yield made
    made.collection.close()


@pytest.fixture
def searcher(truth: Truth) -> Iterator[Searcher]:
    with Searcher(truth.collection.path, device="cpu") as opened:
        yield opened


class Built:
    """Stands for `rebuild` and tells when it was called, and when it is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.how: list[dict[str, Any]] = []
        self.done = threading.Semaphore(0)
        self.fails = False
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        monkeypatch.setattr(maintain, "rebuild", self)

    def __call__(self, collection: Any, **how: Any) -> None:
        self.how.append(how)
        self.may_go_on.wait(LONG_S)
        if self.fails:
            self.done.release()
            raise IndexStoreError("the disk is full")
        build(collection, kind="exact")
        self.done.release()


@pytest.mark.parametrize(
    ("fraction", "min_rows", "is_due"),
    [(0.1, 10, True), (0.1, 30, False), (0.16, 10, False), (0.14, 29, True)],
)
def test_an_index_is_due_when_enough_is_fresh_or_dead(
    truth: Truth, searcher: Searcher, fraction: float, min_rows: int, is_due: bool
) -> None:
    maintainer = Maintainer(searcher, rebuild_fraction=fraction, min_rows=min_rows)
    assert not maintainer.is_due()
    truth.upsert([f"{i}" for i in range(190, 200)], unit(10, seed=1))
    truth.delete([f"{i}" for i in range(10)])
    assert searcher.stats() == SearchStats(200, 10, 20)
    assert maintainer.is_due() is is_due


@pytest.mark.parametrize(("max_fresh", "is_due"), [(29, True), (30, False)])
def test_an_index_is_due_when_too_many_are_fresh_for_every_search_to_compare(
    truth: Truth, searcher: Searcher, max_fresh: int, is_due: bool
) -> None:
    maintainer = Maintainer(searcher, max_fresh=max_fresh)
    truth.delete([f"{i}" for i in range(100)])
    assert not maintainer.is_due()  # dead ones are passed over
    truth.upsert([f"new-{i}" for i in range(30)], unit(30, seed=1))
    assert maintainer.is_due() is is_due


def test_by_default_fifty_thousand_fresh_are_too_many_of_any_index(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    maintainer = Maintainer(searcher)
    for fresh, is_due in ((50_000, False), (50_001, True)):
        monkeypatch.setattr(searcher, "stats", lambda n=fresh: SearchStats(10_000_000, n, 0))
        assert maintainer.is_due() is is_due


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_flood_of_writes_is_not_followed_by_build_upon_build(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 writes a second for ten hours into an index that takes 1 ms a vector to build."""
    clock = Clock()
    stats = SearchStats(1_000_000, 0, 0)
    monkeypatch.setattr(searcher, "stats", lambda: stats)

    def build_it(_: object) -> None:
        nonlocal stats
        covered = stats.indexed + stats.fresh
        clock.now += covered / 1000
        stats = SearchStats(covered, covered, 0)

    monkeypatch.setattr(searcher, "take_index", build_it)
    maintainer = Maintainer(searcher, clock=clock)
    builds = []
    while clock.now < 36_000:
        clock.now += 1
        stats = SearchStats(stats.indexed, stats.fresh + 1000, 0)
        if maintainer.is_due():
            maintainer.rebuild()
            builds.append(stats.indexed)
    assert len(builds) <= 4
    assert all(later >= 3 * earlier for earlier, later in zip(builds, builds[1:], strict=False))


@pytest.mark.parametrize(
    ("fresh", "rest_s"), [(200_000, 60.0), (100_000, 60.0), (60_000, 100.0), (50_001, 119.998)]
)
def test_a_maintainer_rests_as_long_as_the_build_took_and_longer_for_few_changes(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch, fresh: int, rest_s: float
) -> None:
    clock = Clock()
    monkeypatch.setattr(searcher, "stats", lambda: SearchStats(1_000_000, fresh, 0))
    monkeypatch.setattr(searcher, "take_index", lambda _: setattr(clock, "now", clock.now + 60))
    maintainer = Maintainer(searcher, clock=clock)
    assert maintainer.is_due()  # nothing was built yet
    maintainer.rebuild()
    assert not maintainer.is_due()
    clock.now += rest_s - 0.01
    assert not maintainer.is_due()
    clock.now += 0.02
    assert maintainer.is_due()


def test_a_build_that_failed_late_is_rested_from_as_well(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(searcher, "stats", lambda: SearchStats(0, 60_000, 0))

    def fail(_: object) -> None:
        clock.now += 60
        raise IndexStoreError("the disk is full")

    monkeypatch.setattr(searcher, "take_index", fail)
    maintainer = Maintainer(searcher, clock=clock)
    with pytest.raises(IndexStoreError):
        maintainer.rebuild()
    assert not maintainer.is_due()
    clock.now += 60
    assert maintainer.is_due()


def test_a_rebuild_is_taken_by_the_searcher(truth: Truth, searcher: Searcher) -> None:
    truth.upsert([f"{i}" for i in range(150, 300)], unit(150, seed=1))
    Maintainer(searcher).rebuild()
    assert searcher.stats() == SearchStats(300, 0, 0)
    truth.check(searcher, unit(3, seed=3), 10)


def test_a_rebuild_makes_what_was_asked_for(truth: Truth, searcher: Searcher) -> None:
    queries = unit(40, seed=7)
    before = build(
        truth.collection, kind="HNSW8,Flat", queries=queries, recall_target=0.9, memory_bytes=10**8
    )
    truth.upsert(["new"], unit(1, seed=1))
    Maintainer(searcher).rebuild()
    after = searcher.info
    assert after
    assert (after.count, after.kind, after.recall_target) == (201, "HNSW8,Flat", 0.9)
    assert after.asked == before.asked
    assert after.queries == "40 given queries"
    Maintainer(searcher).rebuild()  # and it keeps them for the next
    assert searcher.info
    kept = cache.read_queries(truth.collection.path, searcher.info)
    assert kept is not None
    assert np.allclose(kept, queries, atol=1e-6)


def test_what_a_maintainer_is_told_comes_before_what_was_asked_for(
    truth: Truth, searcher: Searcher
) -> None:
    build(truth.collection, kind="HNSW8,Flat", queries=unit(40, seed=7), recall_target=0.9)
    Maintainer(
        searcher,
        kind="IVF4,Flat",
        queries=unit(50, seed=8),
        recall_target=0.8,
        memory_bytes=10**8,
    ).rebuild()
    info = searcher.info
    assert info
    assert (info.kind, info.recall_target) == ("IVF4,Flat", 0.8)
    assert info.queries == "50 given queries"
    assert info.asked
    assert info.asked["memory_bytes"] == 10**8


def test_writes_that_a_search_meets_wake_the_thread(
    truth: Truth, searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = Built(monkeypatch)
    with Maintainer(searcher, min_rows=20, poll_s=LONG_S, kind="ivf", threads=3):
        truth.upsert([f"new-{i}" for i in range(30)], unit(30, seed=1))
        truth.check(searcher, unit(3, seed=3), 10)
        assert built.done.acquire(timeout=LONG_S)
    assert [(how["kind"], how["field"], how["threads"]) for how in built.how] == [
        ("ivf", "image", 3)
    ]
    truth.check(searcher, unit(3, seed=3), 10)


def test_notify_wakes_the_thread_and_too_little_builds_nothing(
    truth: Truth, searcher: Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = Built(monkeypatch)
    looked = threading.Semaphore(0)
    is_due = Maintainer.is_due
    monkeypatch.setattr(Maintainer, "is_due", lambda self: (is_due(self), looked.release())[0])
    with Maintainer(searcher, min_rows=20, poll_s=LONG_S) as maintainer:
        truth.upsert(["a"], unit(1, seed=1))
        maintainer.notify()
        assert looked.acquire(timeout=LONG_S)
        truth.upsert([f"new-{i}" for i in range(30)], unit(30, seed=1))
        maintainer.notify()
        assert built.done.acquire(timeout=LONG_S)
    assert len(built.how) == 1


def test_an_error_is_logged_and_the_next_attempt_succeeds(
    truth: Truth,
    searcher: Searcher,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    built = Built(monkeypatch)
    built.fails = True
    truth.upsert([f"new-{i}" for i in range(30)], unit(30, seed=1))
    with Maintainer(searcher, min_rows=20, poll_s=0.01, retry_s=0.01) as maintainer:
        maintainer.notify()
        assert built.done.acquire(timeout=LONG_S)
        truth.check(searcher, unit(3, seed=3), 10)
        built.fails = False
        while not caplog.text or len(built.how) < 2:
            assert built.done.acquire(timeout=LONG_S)
    assert "was not built anew, the old one stays: the disk is full" in caplog.text
    truth.check(searcher, unit(3, seed=3), 10)


def test_a_build_by_another_process_is_no_failure_of_searches(
    truth: Truth, searcher: Searcher, caplog: pytest.LogCaptureFixture
) -> None:
    truth.upsert([f"new-{i}" for i in range(30)], unit(30, seed=1))
    logged = threading.Event()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.set()

    handler = Handler()
    maintain.logger.addHandler(handler)
    try:
        with (
            directory_lock(truth.collection.path, ".index.lock", wait=False),
            Maintainer(searcher, min_rows=20, retry_s=LONG_S) as maintainer,
        ):
            maintainer.notify()
            assert logged.wait(LONG_S)
            truth.check(searcher, unit(3, seed=3), 10)
    finally:
        maintain.logger.removeHandler(handler)
    assert "being indexed by another process" in caplog.text


def test_closing_does_not_wait_for_a_long_build(
    truth: Truth,
    searcher: Searcher,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(maintain, "_PATIENCE_S", 0.05)
    built = Built(monkeypatch)
    built.may_go_on.clear()
    truth.upsert([f"new-{i}" for i in range(30)], unit(30, seed=1))
    maintainer = Maintainer(searcher, min_rows=20)
    with maintainer:
        maintainer.notify()
        while not built.how:
            threading.Event().wait(0.005)
    assert "still being built and is not waited for" in caplog.text
    built.may_go_on.set()
    maintainer._thread.join(LONG_S)
    assert not maintainer._thread.is_alive()
    assert searcher.stats().fresh == 0  # a search takes what was left behind


def test_what_fails_because_it_was_closed_is_no_error(
    searcher: Searcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    built = Built(monkeypatch)
    built.may_go_on.clear()
    built.fails = True
    with Maintainer(searcher, min_rows=0, poll_s=0.01) as maintainer:
        monkeypatch.setattr(searcher, "stats", lambda: SearchStats(10, 10, 0))
        maintainer.notify()
        while not built.how:
            threading.Event().wait(0.005)
        maintainer._closing.set()
        built.may_go_on.set()
    assert "not built anew" not in caplog.text
