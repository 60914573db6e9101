"""Query -> candidates -> exact scores -> hits.

A `Searcher` answers from one snapshot of the collection: the FAISS index finds candidates among
the rows it was built from, what was written since is scanned in memory, what was deleted is left
out, and all candidates are scored again with the stored float32 vectors. Start at
`Searcher.search`.

Legend: Q queries, E embedding, C candidates.
"""

import contextlib
import dataclasses
import logging
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np

from clipserve.errors import IndexStoreError
from clipserve.files import sha256
from index.backend import (
    Backend,
    MemoryBackend,
    exact_index,
    make_backend,
    overfetch,
    resolve_device,
)
from index.build import EXACT_LIMIT, INFO_FILE, IndexInfo, read_info
from index.collection import Collection, Item, is_writable

logger = logging.getLogger(__name__)

_CANDIDATE_ROWS = 65536
"""candidates whose vectors are in memory at a time"""
_QUERIES_AT_A_TIME = 256
_LOAD_ATTEMPTS = 3
_ENOUGH = 0.75
"""of the usual candidates, when others turned out to be deleted"""


@dataclass(frozen=True)
class Hit:
    """One answer."""

    id: str
    score: float
    """cosine similarity to the query"""
    caption: str = ""
    source: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


class Searcher:
    """Nearest items of one collection. Many threads may search; every write is seen at once.

    `fingerprint` is the querying model's: IndexStoreError if the collection is another's. `device`:
    "auto" (a GPU if FAISS sees one), "cpu", "cuda", "cuda:1".
    """

    def __init__(
        self, collection_path: Path, *, fingerprint: str | None = None, device: str = "auto"
    ) -> None:
        self._device = resolve_device(device)
        self.collection = Collection.open(
            collection_path, read_only=not is_writable(collection_path)
        )
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        try:
            if fingerprint is not None:
                self.collection.check_model(fingerprint)
            self._stamp = self._index_stamp()
            with self.collection.snapshot() as generation:
                self._view = self._load(generation)
        except BaseException:
            self.collection.close()
            raise

    @property
    def info(self) -> IndexInfo | None:
        """The index in use; None while all vectors are scanned."""
        return self._view.info

    def search(self, vectors: np.ndarray, k: int = 10) -> list[list[Hit]]:
        """The k items of highest cosine similarity to each of vectors (Q, E), best first.

        Equal scores are in the order of their ids. Fewer than k only where the collection is
        smaller. A query need not be of unit length; IndexStoreError if it is zero, not finite, or
        of another dimension.
        """
        queries = self._check_queries(vectors)
        if k < 1:
            raise IndexStoreError(f"k = {k} is not allowed; ask for at least 1")
        self._take_new_index()
        with contextlib.ExitStack() as stack:
            with self._lock:  # so that snapshots follow each other as their views do
                generation = stack.enter_context(self.collection.snapshot())
                view = self._view = self._advance(self._view, generation)
            return self._answer(view, queries, min(k, len(view)))

    def close(self) -> None:
        """Close the collection; no thread may be searching any more."""
        self.collection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_queries(self, vectors: np.ndarray) -> np.ndarray:
        """Unit vectors (Q, E) float64."""
        queries = np.asarray(vectors, dtype=np.float64)
        if queries.ndim != 2 or queries.shape[1] != self.collection.embed_dim:
            raise IndexStoreError(
                f"query vectors of shape {queries.shape}; collection {self.collection.name!r} needs"
                f" (number of queries, {self.collection.embed_dim})"
            )
        norms = np.linalg.norm(queries, axis=1, keepdims=True)
        if not (np.isfinite(norms) & (norms > 0)).all():
            raise IndexStoreError("a query vector is zero or not finite; it has no direction")
        return np.asarray(queries / norms)

    def _take_new_index(self) -> None:
        """Load an index that was built since; other threads go on with the old one meanwhile."""
        stamp = self._index_stamp()
        if stamp == self._stamp or not self._loading.acquire(blocking=False):
            return
        try:
            with self.collection.snapshot() as generation:
                view = self._load(generation)
            with self._lock:
                self._view, self._stamp = view, stamp
        finally:
            self._loading.release()

    def _index_stamp(self) -> tuple[int, int] | None:
        """Changes when an index is put in place."""
        try:
            status = (self.collection.path / INFO_FILE).stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_ino

    def _load(self, generation: int) -> "_View":
        """Everything anew, inside a snapshot."""
        collection = self.collection
        live = collection.rowids()
        base, info = self._load_index(generation)
        indexed = live[live <= info.max_rowid] if info and base else live[:0]
        if info and base and len(indexed) > len(base):
            self._ignore(info, f"it has {len(base)} of the {len(indexed)} vectors before it")
            base, info, indexed = None, None, live[:0]
        if base is None and self._device != "cpu" and len(live):
            index = exact_index(collection.embed_dim, collection.vector_blocks())
            base, indexed = make_backend(index, {}, self._device), live
        if base is None and len(live) > EXACT_LIMIT:
            logger.warning(
                "collection %r has %d vectors and no index, each search compares all of them;"
                " build one: clipserve index build %s",
                collection.name,
                len(live),
                collection.path,
            )
        last = int(indexed[-1]) if len(indexed) else 0
        view = _View(generation, MemoryBackend(collection.embed_dim), last, indexed, base, info)
        return self._append_new(view)

    def _load_index(self, generation: int) -> tuple[Backend | None, IndexInfo | None]:
        """The index that was built, and its description, if it is there and fits."""
        info = read_info(self.collection.path)
        for _ in range(_LOAD_ATTEMPTS):
            if info is None:
                return None, None
            try:
                return self._read_index(info, generation), info
            except FileNotFoundError:
                missing, info = info, read_info(self.collection.path)
                if info == missing:  # not replaced by a newer one in this moment
                    self._ignore(missing, "its file is gone")
                    return None, None
            except (OSError, RuntimeError, ValueError) as error:
                self._ignore(info, str(error).strip().splitlines()[0])
                return None, None
        return None, None

    def _read_index(self, info: IndexInfo, generation: int) -> Backend | None:
        """ValueError says why the index does not belong here; None for an exact one."""
        collection = self.collection
        if info.fingerprint != collection.fingerprint:
            raise ValueError(f"it was built for another model, {info.fingerprint[:12]}")
        if info.identity != collection.identity or info.generation > generation:
            raise ValueError("it was built from another collection, or from a later state of it")
        if info.file is None:
            return None
        file = collection.path / info.file
        if sha256(file) != info.sha256:
            raise ValueError("its sha256 is not the one it was written with")
        return make_backend(faiss.read_index(str(file)), info.nprobe, self._device)

    def _ignore(self, info: IndexInfo, reason: str) -> None:
        logger.warning(
            "index %s of collection %s is ignored: %s; all vectors are compared until it is built"
            " again: clipserve index build %s",
            info.file or INFO_FILE,
            self.collection.name,
            reason,
            self.collection.path,
        )

    def _advance(self, view: "_View", generation: int) -> "_View":
        """The view brought to the snapshot's generation."""
        if generation == view.generation:
            return view
        deleted = self.collection.deleted_since(view.generation)
        if deleted is None:
            return self._load(generation)
        view = self._append_new(view)
        return dataclasses.replace(
            view,
            generation=generation,
            rows=view.rows.remove(deleted),
            indexed=view.indexed[~_is_among(view.indexed, np.sort(deleted))],
        )

    def _append_new(self, view: "_View") -> "_View":
        rows, last = view.rows, view.last_rowid
        for rowids, vectors in self.collection.vector_blocks(after=last):
            rows, last = rows.append(rowids, vectors), int(rowids[-1])
        return dataclasses.replace(view, rows=rows, last_rowid=last)

    def _answer(self, view: "_View", queries: np.ndarray, k: int) -> list[list[Hit]]:
        if k == 0:
            return [[] for _ in queries]
        answers = []
        for start in range(0, len(queries), _QUERIES_AT_A_TIME):
            ranked = self._rank(view, queries[start : start + _QUERIES_AT_A_TIME], k)
            items = self.collection.items_of(
                np.unique(np.concatenate([rowids for rowids, _ in ranked]))
            )
            for rowids, scores in ranked:
                pairs = zip(rowids.tolist(), scores.tolist(), strict=True)
                answers.append([_to_hit(items[rowid], score) for rowid, score in pairs])
        return answers

    def _rank(
        self, view: "_View", queries: np.ndarray, k: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Row numbers (k,) and exact scores (k,) of the best of each query, in order.

        Looks again, twice as far, for the queries where too few candidates are alive, or where one
        that was not looked at could be as good as the last of the k.
        """
        ranked: list[Any] = [None] * len(queries)
        unsettled = np.arange(len(queries))
        widening = 1
        while len(unsettled):
            labels, limits, is_all = view.candidates(queries[unsettled], k, widening)
            scored = self._score(queries[unsettled], labels)
            for i, limit, (rowids, scores) in zip(unsettled, limits, scored, strict=True):
                if is_all or (len(scores) >= k and np.partition(scores, -k)[-k] > limit):
                    ranked[i] = self._best(rowids, scores, k)
            unsettled = np.array([i for i in unsettled if ranked[i] is None], dtype=np.int64)
            widening *= 2
        return ranked

    def _score(
        self, queries: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each query its candidates and their cosines, from the stored vectors.

        Summed in float64 and then rounded, so that equal vectors have equal scores.
        """
        step = max(1, _CANDIDATE_ROWS // max(1, labels.shape[1]))
        for start in range(0, len(queries), step):
            rows = slice(start, start + step)
            distinct = np.unique(labels[rows])
            distinct = distinct[distinct >= 0]
            vectors = self.collection.vectors_of(distinct)
            for query, own in zip(queries[rows], labels[rows], strict=True):
                rowids = own[own >= 0]
                scores = vectors[np.searchsorted(distinct, rowids)].astype(np.float64) @ query
                yield rowids, scores.clip(-1, 1).astype(np.float32)

    def _best(
        self, rowids: np.ndarray, scores: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best in order; equals, also those at the k-th place, by their ids."""
        order = np.argsort(-scores, kind="stable")
        last = scores[order[min(k, len(order)) - 1]]
        order = order[scores[order] >= last]
        rowids, scores = rowids[order], scores[order]
        if (scores[1:] == scores[:-1]).any():
            ids = self.collection.ids_of(rowids)
            keys = zip((-scores).tolist(), (ids[rowid] for rowid in rowids.tolist()), strict=True)
            order = np.array([place for _, place in sorted((key, i) for i, key in enumerate(keys))])
            rowids, scores = rowids[order], scores[order]
        return rowids[:k], scores[:k]


@dataclass(frozen=True)
class _View:
    """What is searched: one generation of the collection. Never changed; a later one is made."""

    generation: int
    rows: MemoryBackend
    """the live rows that the index does not have"""
    last_rowid: int
    """nothing above it is in here"""
    indexed: np.ndarray
    """row numbers, ascending, that the index has and that are alive"""
    base: Backend | None
    info: IndexInfo | None

    def __len__(self) -> int:
        return len(self.indexed) + len(self.rows)

    def candidates(
        self, queries: np.ndarray, k: int, widening: int
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """Labels (Q, C) of live rows, or -1, for a search for k, `widening` times as far as usual.

        Then the scores (Q,) that nothing passed over can exceed, as far as that is known (an index
        that passes lists over knows of no bound), and whether nothing was passed over at all.
        """
        queries = queries.astype(np.float32)
        fetch = overfetch(k) * widening
        scores, labels = self.rows.search(queries, fetch)
        is_all = fetch >= len(self.rows)
        limits = np.full(len(queries), -np.inf) if is_all else scores[:, -1] + self.rows.error
        if len(self.indexed):
            found, is_starved = self._search_base(queries, k, widening)
            labels = np.concatenate([labels, found], axis=1)
            limits[is_starved] = np.inf
            is_all &= found.shape[1] == len(self.indexed)
        return labels, limits, is_all

    def _search_base(
        self, queries: np.ndarray, k: int, widening: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Live rows of the index, or -1; and for which queries the dead took the places of many.

        The more of the index is dead, the farther it is searched, until all that live are few
        enough to be taken without it.
        """
        assert self.base is not None
        farther = widening * len(self.base) / len(self.indexed)
        fetch = math.ceil(overfetch(k) * farther)
        if fetch >= len(self.indexed):
            shape = (len(queries), len(self.indexed))
            return np.broadcast_to(self.indexed, shape), np.zeros(len(queries), dtype=bool)
        breadth = min(math.ceil(self.base.breadth(k) * farther), self.base.max_breadth)
        _, labels = self.base.search(queries, fetch, breadth)
        is_alive = _is_among(labels, self.indexed)
        # Fewer found than asked for is as it was when breadth was tuned: the lists had no more.
        is_cut = (labels >= 0).all(axis=1)
        is_starved = is_cut & (is_alive.sum(axis=1) < _ENOUGH * overfetch(k))
        return np.where(is_alive, labels, -1), is_starved


def _is_among(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Whether each value is in a sorted array; fast where the array is long and the values few."""
    if not len(ascending):
        return np.zeros(values.shape, dtype=bool)
    places = np.searchsorted(ascending, values).clip(max=len(ascending) - 1)
    return np.asarray(ascending[places] == values)


def _to_hit(item: Item, score: float) -> Hit:
    return Hit(item.id, score, item.caption, item.source, item.metadata)
