"""Many threads search while one writes, deletes and has the index built anew."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from index import maintain, rank
from index.backends.faiss_cpu import FaissBackend
from index.collection import Collection
from index.filters import parse
from index.items import Item
from index.maintain import Maintainer
from index.search import Searcher

DIM = 16
NUM_SEARCHERS = 16
PATIENCE_S = 120


def unit(count: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Log:
    """What was acknowledged, in an order that all threads agree on, and what has been seen."""

    def __init__(self, end: float) -> None:
        self._end = end
        self._lock = threading.Lock()
        self._live: dict[str, np.ndarray] = {}
        self._newest: list[str] = []
        self._dead: set[str] = set()
        self.problems: list[str] = []
        self.num_searches = 0
        self.indexes: set[int] = set()
        """generations of those that were searched"""
        self.num_masked = 0
        """searches that asked an index for some of its rows"""

    def is_over(self) -> bool:
        """A slow machine gets more time to see what there is to see."""
        seen = len(self.indexes) > 1 and self.num_searches > 100 and self.num_masked > 10
        return bool(self.problems) or time.monotonic() > self._end + (0 if seen else PATIENCE_S)

    def wrote(self, ids: list[str], vectors: np.ndarray) -> None:
        with self._lock:
            self._live |= dict(zip(ids, vectors, strict=True))
            self._newest = (self._newest + ids)[-200:]

    def deletes(self, ids: list[str]) -> None:
        """Before it is done: they are not expected any more, and not forbidden yet."""
        with self._lock:
            for id in ids:
                del self._live[id]

    def deleted(self, ids: list[str]) -> None:
        with self._lock:
            self._dead.update(ids)

    def some(self, random: np.random.Generator) -> tuple[str, np.ndarray] | None:
        """An item that is there for certain, one of the last written."""
        with self._lock:
            alive = [id for id in self._newest if id in self._live]
            if not alive:
                return None
            id = alive[random.integers(len(alive))]
            return id, self._live[id]

    def dead(self) -> set[str]:
        with self._lock:
            return set(self._dead)

    def still_has(self, id: str, vector: np.ndarray) -> bool:
        """Neither deleted nor moved since it was handed out."""
        with self._lock:
            return self._live.get(id) is vector


def write(path: Path, log: Log) -> int:
    """New items, moved ones and deletions in turn; returns how many writes were acknowledged."""
    random = np.random.default_rng(0)
    written: list[str] = []
    writes = 0
    with Collection.open(path) as collection:
        while not log.is_over():
            new = [f"{writes}-{i}" for i in range(20)]
            moved = [written[i] for i in random.choice(len(written), min(5, len(written)), False)]
            ids = new + moved
            vectors = unit(len(ids), writes)
            log.deletes(moved)
            items = [Item(id, metadata={"even": int(id.split("-")[1]) % 2 == 0}) for id in ids]
            collection.upsert(items, vectors)
            log.wrote(ids, vectors)
            written += new
            if len(written) > 1000:
                doomed = [written.pop(i) for i in random.integers(0, 900, 25)]
                log.deletes(doomed)
                collection.delete(doomed)
                log.deleted(doomed)
            writes += 2
    return writes


def look(searcher: Searcher, log: Log, seed: int) -> None:
    random = np.random.default_rng(seed)
    even = parse({"even": True})
    while not log.is_over():
        known = log.some(random)
        if known is None:
            continue
        id, vector = known
        wants_even = random.random() < 0.3
        dead = log.dead()
        try:
            (hits,) = searcher.search(
                vector[None], 10, filter=even if wants_even else None, with_items=seed % 4 > 0
            )
        except Exception as error:
            log.problems.append(repr(error))
            raise
        found = [hit.id for hit in hits]
        if dead & set(found):
            log.problems.append(f"{dead & set(found)} were deleted before the search began")
        if wants_even and not all(int(hit.id.split("-")[1]) % 2 == 0 for hit in hits):
            log.problems.append(f"{found} do not all match the filter")
        is_wanted = not wants_even or int(id.split("-")[1]) % 2 == 0
        if is_wanted and found[:1] != [id] and log.still_has(id, vector):
            log.problems.append(f"{id} was acknowledged before the search began; found: {found}")
        log.num_searches += 1
        if searcher.info is not None:
            log.indexes.add(searcher.info.generation)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "pets"
    Collection.create(path, fingerprint="a" * 64, model_name="t", embed_dim=DIM).close()
    return path


@pytest.mark.parametrize(
    "seconds", [pytest.param(8, id="8s"), pytest.param(120, id="120s", marks=pytest.mark.slow)]
)
def test_searches_are_right_while_one_writes_and_rebuilds_swap(
    path: Path,
    seconds: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sixteen threads, on two searchers; one of them has its index rebuilt all the time."""
    monkeypatch.setattr(maintain, "_PATIENCE_S", 60.0)
    monkeypatch.setattr(rank, "SCAN_ROWS", 50)  # so that filtered searches ask the index
    search = FaissBackend.search
    log = Log(time.monotonic() + seconds)

    def search_and_count(
        backend: FaissBackend,
        queries: np.ndarray,
        k: int,
        breadth: int,
        mask: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        if mask is not None:
            log.num_masked += 1
        return search(backend, queries, k, breadth, mask)

    monkeypatch.setattr(FaissBackend, "search", search_and_count)
    with (
        Searcher(path, device="cpu") as searcher,
        Searcher(path, device="cpu") as other,
        Maintainer(searcher, min_rows=100, rebuild_fraction=0.05, kind="IVF8,SQ8", poll_s=0.1),
    ):
        threads = [
            threading.Thread(target=look, args=(one, log, seed))
            for seed, one in enumerate([searcher, other] * (NUM_SEARCHERS // 2))
        ]
        for thread in threads:
            thread.start()
        writes = write(path, log)
        for thread in threads:
            thread.join()
    assert log.problems == []
    assert [record.message for record in caplog.records if record.levelname != "INFO"] == []
    assert len(log.indexes) > 1
    assert writes > 20
    assert log.num_searches > 100
    assert log.num_masked > 10
