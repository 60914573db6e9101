"""Query -> candidates -> exact scores -> hits.

A `Searcher` answers from one generation of the collection: the index finds candidates among the
rows it was built from, what was written since is scanned in memory, what was deleted or does not
match is left out, and all candidates are scored again with the stored vectors. Start at
`Searcher.search`; `view.py` is what is searched, `rank.py` how the best are found.

Legend: Q queries, E embedding, n hits.
"""

import contextlib
import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from clipserve.errors import CollectionClosed, IndexStoreError
from index import cache
from index.backends import resolve_device
from index.choose import EXACT_LIMIT
from index.collection import FIELDS, Collection
from index.columns import Columns
from index.database import is_writable
from index.distinct import Similar, distinct
from index.filters import Filter
from index.info import IndexInfo
from index.items import Item
from index.rank import best
from index.view import View

logger = logging.getLogger(__name__)

MAX_HITS = 10_000
"""`offset` and `k` together, and ids left out"""

_QUERIES_AT_A_TIME = 256


@dataclass(slots=True)
class Hit:
    """One answer. Not frozen: that takes three times as long to make."""

    id: str
    score: float
    """cosine similarity to the query"""
    caption: str = ""
    source: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    matching: float | None = None
    """the probability that text and picture belong together, where `rerank` read both"""


@dataclass(frozen=True)
class SearchStats:
    """What a search goes through: an index is due anew when much of it is fresh or dead."""

    indexed: int
    """vectors in the index"""
    fresh: int
    """written since, all compared with every query"""
    dead: int
    """in the index, but deleted since"""


@dataclass(frozen=True)
class _Wanted:
    """Which of the ranked are the answer; IndexStoreError for what makes none."""

    k: int
    offset: int
    min_score: float
    unique: float | None
    exclude: tuple[str, ...]
    with_items: bool
    exact: bool
    admit: Callable[[int], None] | None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise IndexStoreError(f"k = {self.k} is not allowed; ask for at least 1")
        if self.offset < 0 or self.offset + self.k > MAX_HITS:
            raise IndexStoreError(
                f"offset {self.offset} and k {self.k} are not allowed; offset is at least 0, and"
                f" both together are at most {MAX_HITS}"
            )
        if len(self.exclude) > MAX_HITS:
            raise IndexStoreError(
                f"{len(self.exclude)} ids to leave out are not allowed; give at most {MAX_HITS}"
            )
        if math.isnan(self.min_score):
            raise IndexStoreError("min_score nan is not allowed; give a cosine from -1 to 1")
        if self.unique is not None and not 0 < self.unique <= 1:
            raise IndexStoreError(
                f"unique = {self.unique:g} is not allowed; give a cosine above 0, up to 1"
            )


class Searcher:
    """Nearest items of one collection. Many threads may search; every write is seen at once.

    `fingerprint` is the querying model's: IndexStoreError if the collection is another's. `device`:
    "auto" (all GPUs, if there are any), "cpu", "cuda", "cuda:1". `field`: the vectors that are
    searched, "image" or "text".
    """

    def __init__(
        self,
        collection_path: Path,
        *,
        fingerprint: str | None = None,
        device: str = "auto",
        field: str = "image",
    ) -> None:
        self._device = resolve_device(device)
        self.field = field
        self.collection = Collection.open(
            collection_path, read_only=not is_writable(collection_path)
        )
        self._columns = Columns(self.collection)
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._open = threading.Lock()
        self._watchers: list[Callable[[], None]] = []
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
        return self._view.base.info if self._view.base else None

    def search(
        self,
        vectors: np.ndarray,
        k: int = 10,
        *,
        filter: Filter | None = None,
        offset: int = 0,
        min_score: float | None = None,
        unique: float | None = None,
        exclude: Sequence[str] = (),
        with_items: bool = True,
        exact: bool = False,
        admit: Callable[[int], None] | None = None,
    ) -> list[list[Hit]]:
        """The k items of highest cosine similarity to each of vectors (Q, E), best first.

        Equal scores are in the order of their ids. Fewer than k only where there are no more: a
        query need not be of unit length; IndexStoreError if it is zero, not finite, or of another
        dimension.

        filter: only items it holds for. offset: so many of the best are passed over, k + offset is
        at most MAX_HITS. min_score: no cosine below it. unique: not what has a cosine of at least
        that to a better hit, which is shown instead; of the best 10,000 alone, so there may be
        fewer than k. exclude: ids to leave out. with_items: False leaves caption, source and
        metadata empty and reads nothing from disk for a hit in the index; the ids are in memory
        from the first such search on. exact: every vector is compared, whatever index there is.
        admit: is told how many bytes the captions, sources and metadata of the hits have, before
        they are read; what it raises ends the search. Less than 0 is of hits that are gone.
        """
        wanted = _Wanted(
            k,
            offset,
            -math.inf if min_score is None else min_score,
            unique,
            tuple(dict.fromkeys(exclude)),
            with_items,
            exact,
            admit,
        )
        queries = self._check_queries(vectors)
        self._take_new_index()
        if filter is None and not wanted.exclude:
            # No lock and no snapshot: a row never changes, so all that can happen to the newest
            # view while it is searched is that a hit of it is deleted, and then it is not found.
            # (An id that is left out is looked up, and could be another row's by then.)
            with contextlib.suppress(_GoneError):
                return self._answer(self._newest(), None, queries, wanted)
        with self._pinned() as view:
            return self._answer(view, filter, queries, wanted)

    def count(self, filter: Filter | None = None) -> int:
        """Items, with a vector in this field or not, that the filter holds for."""
        if filter is None:
            return self.collection.count()
        with self.collection.snapshot():
            rowids = np.unique(np.concatenate([self.collection.rowids(name) for name in FIELDS]))
            return int(np.count_nonzero(self._columns.mask(filter, rowids)))

    def stats(self) -> SearchStats:
        """Of the collection, and the index in it, as they are now."""
        self._take_new_index()
        view = self._newest()
        size = len(view.base) if view.base else 0
        return SearchStats(size, len(view.fresh), size - view.live.count)

    def refresh(self) -> None:
        """Read what was written or built since, so that no search has to."""
        self._take_new_index()
        self._newest()

    def take_index(self, build: Callable[[], bool]) -> None:
        """Call `build`, and load what it made if it returns true.

        Until that is loaded searches go on with the old index, and none has to load the new one.
        """
        with self._loading:
            if build():
                self._load_index()

    def watch(self, notify: Callable[[], None]) -> None:
        """Have it called whenever writes were noticed, of this process or another; it must be
        quick."""
        self._watchers.append(notify)

    def close(self) -> None:
        """Close the collection; no thread may be searching any more. An index that is being loaded
        is waited for, one that is being built is not taken."""
        with self._open:
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
        norms = np.sqrt(np.einsum("qe,qe->q", queries, queries))
        if not ((norms > 0) & (norms < math.inf)).all():
            raise IndexStoreError("a query vector is zero or not finite; it has no direction")
        return np.asarray(queries / norms[:, None])

    def _take_new_index(self) -> None:
        """Load an index that was built since; other threads go on with the old one meanwhile."""
        stamp = self._index_stamp()
        if stamp == self._stamp or not self._loading.acquire(blocking=False):
            return
        try:
            self._load_index()
        except CollectionClosed:
            raise
        except Exception:
            # Such as a GPU or a memory without room for both: the one in use answers as before.
            logger.exception(
                "the new %s index of collection %r cannot be loaded; searches go on with the old"
                " one, until another is built",
                self.field,
                self.collection.name,
            )
            self._stamp = stamp
        finally:
            self._loading.release()

    def _load_index(self) -> None:
        """CollectionClosed if it is closed meanwhile."""
        stamp = self._index_stamp()
        old = self._view.base
        with self._open, self.collection.snapshot() as generation:
            view = self._load(generation)
            if old and old.has_ids and view.base:
                view.base.ids(self.collection)  # which the next search may want as the last one did
        with self._lock:
            self._view, self._stamp = view, stamp

    def _index_stamp(self) -> tuple[int, int] | None:
        return cache.stamp(self.collection.path, self.field)

    def _newest(self) -> View:
        """The view of everything acknowledged so far."""
        view = self._view
        if self.collection.generation() <= view.generation:
            return view
        with self._pinned() as view:
            return view

    @contextlib.contextmanager
    def _pinned(self) -> Iterator[View]:
        """The newest view, and a snapshot of its generation for as long as it is used."""
        with contextlib.ExitStack() as stack:
            with self._lock:  # so that snapshots follow each other as their views do
                generation = stack.enter_context(self.collection.snapshot())
                old = self._view
                if generation != old.generation:
                    self._view = old.advance(self.collection, generation)
                current = self._view
            if current is not old:
                for notify in self._watchers:
                    notify()
            yield current

    def _load(self, generation: int) -> View:
        loaded = View.load(self.collection, self.field, self._device, generation)
        if loaded.base is None and len(loaded) > EXACT_LIMIT:
            logger.warning(
                "collection %r has %d vectors and no index, each search compares all of them;"
                " build one: clipserve index build %s",
                self.collection.name,
                len(loaded),
                self.collection.path,
            )
        return loaded

    def _answer(
        self, view: View, filter: Filter | None, queries: np.ndarray, wanted: _Wanted
    ) -> list[list[Hit]]:
        answers = []
        admitted: list[int] = []
        try:
            for start in range(0, len(queries), _QUERIES_AT_A_TIME):
                some = queries[start : start + _QUERIES_AT_A_TIME]
                answers += self._hits(
                    view, self._rank(view, filter, some, wanted), wanted, admitted
                )
        except _GoneError:
            if wanted.admit is not None:
                wanted.admit(-sum(admitted))
            raise
        return answers

    def _rank(
        self, view: View, filter: Filter | None, queries: np.ndarray, wanted: _Wanted
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Row numbers (n,) and scores (n,) of each answer."""
        chosen = view.select(filter, self._columns)
        left_out = np.zeros(0, np.int64)
        if wanted.exclude:
            left_out = np.array(list(self.collection.rowids_of(wanted.exclude).values()), np.int64)
        first, end = wanted.offset, wanted.offset + wanted.k
        if wanted.exact:
            view = view.exactly()
        if wanted.unique is None:
            ranked = best(view, chosen, queries, end + len(left_out), self._ids_of)
            rows = list(zip(*ranked, strict=True))
            if len(left_out):
                rows = [_keep(row, ~np.isin(row[0], left_out)) for row in rows]
        else:
            similar = Similar(wanted.unique, left_out, wanted.min_score)
            rows = distinct(view, chosen, queries, end, similar, self._ids_of)
        if wanted.min_score > -1:
            rows = [_keep(row, row[1] >= wanted.min_score) for row in rows]
        return [(rowids[first:end], scores[first:end]) for rowids, scores in rows]

    def _hits(
        self,
        view: View,
        ranked: list[tuple[np.ndarray, np.ndarray]],
        wanted: _Wanted,
        admitted: list[int],
    ) -> list[list[Hit]]:
        """Of all answers together, which is one look into the database."""
        rowids = np.concatenate([rowids for rowids, _ in ranked])
        scores = np.concatenate([scores for _, scores in ranked]).tolist()
        if wanted.with_items:
            if wanted.admit is not None:
                admitted.append(self._size_of(rowids))
                wanted.admit(admitted[-1])
            hits = list(map(_to_hit, self._items_of(rowids), scores))
        else:
            ids = view.ids_of(rowids, self.collection)
            if not all(ids):
                raise _GoneError
            hits = list(map(Hit, ids, scores))
        ends = itertools.accumulate((len(rowids) for rowids, _ in ranked), initial=0)
        return [hits[start:end] for start, end in itertools.pairwise(ends)]

    def _size_of(self, rowids: np.ndarray) -> int:
        """Bytes of what is told of the hits, each as often as it is one."""
        sizes = self.collection.sizes_of(np.unique(rowids))
        try:
            return sum(sizes[rowid] for rowid in rowids.tolist())
        except KeyError:
            raise _GoneError from None

    def _items_of(self, rowids: np.ndarray) -> list[Item]:
        items = self.collection.items_of(np.unique(rowids)) if len(rowids) else {}
        try:
            return [items[rowid] for rowid in rowids.tolist()]
        except KeyError:
            raise _GoneError from None

    def _ids_of(self, rowids: np.ndarray) -> dict[int, str]:
        ids = self.collection.ids_of(rowids)
        if len(ids) < len(rowids):
            raise _GoneError
        return ids


class _GoneError(Exception):
    """A row of the view was deleted while it was searched; the newest view does not have it."""


def _to_hit(item: Item, score: float) -> Hit:
    return Hit(item.id, score, item.caption, item.source, item.metadata)


def _keep(row: tuple[np.ndarray, np.ndarray], chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return row[0][chosen], row[1][chosen]
