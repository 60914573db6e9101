"""What one generation of a collection is searched through.

The base: the rows that the built index has, by their places 0..N-1 in its matrix, and which of them
are alive. Beside it the fresh rows, written since, in memory. A view is never changed; `advance`
makes the one of a later generation, and shares with it what stayed. Start at `View.load`.

Legend: N rows of the base, E embedding, n rows.
"""

import copy
import dataclasses
import functools
import logging
import math
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Self

import numpy as np

from index import cache
from index.backends import Backend, make_backend, torch_exact
from index.backends.scan import ScanBackend
from index.collection import BLOCK_ROWS, Collection
from index.columns import Columns
from index.filters import Filter
from index.info import IndexInfo, overfetch

logger = logging.getLogger(__name__)

_MASKS_KEPT = 32
"""filters whose rows of the base are remembered, N bytes each"""
_MASK_BYTES = 2**28
"""of them all"""


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of the base. Equal to itself alone, so that what is known of it can be kept."""

    mask: np.ndarray | None
    """(N,) bool; None for all"""
    count: int

    @classmethod
    def of(cls, mask: np.ndarray) -> Self:
        count = int(np.count_nonzero(mask))
        return cls(None if count == len(mask) else mask, count)

    @functools.cached_property
    def places(self) -> np.ndarray:
        """(count,) int64, ascending."""
        return np.arange(self.count) if self.mask is None else np.flatnonzero(self.mask)

    def without(self, places: np.ndarray) -> Self:
        """A copy in which those are not."""
        if not len(places):
            return self
        mask = np.ones(self.count, dtype=bool) if self.mask is None else self.mask.copy()
        mask[places] = False
        return self.of(mask)


NO_ROWS = Rows(np.zeros(0, dtype=bool), 0)


class Ids:
    """The ids of the base's rows, so that a hit's is known without a look into the database."""

    def __init__(self, text: bytes, ends: np.ndarray) -> None:
        self._text = text
        self._ends = ends

    @classmethod
    def read(cls, collection: Collection, rowids: np.ndarray) -> Self:
        """A row that is dead has none."""
        lengths, texts = [np.zeros(1, dtype=np.int64)], []
        for start in range(0, len(rowids), BLOCK_ROWS):
            block = rowids[start : start + BLOCK_ROWS]
            ids = collection.ids_of(block)
            encoded = [ids.get(rowid, "").encode() for rowid in block.tolist()]
            lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
            texts.append(b"".join(encoded))
        return cls(b"".join(texts), np.cumsum(np.concatenate(lengths)))

    def at(self, places: np.ndarray) -> list[str]:
        """ "" for a row that was dead when they were read."""
        starts, ends = self._ends[places].tolist(), self._ends[places + 1].tolist()
        return [self._text[a:b].decode() for a, b in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class _Matching:
    """What a filter holds for in one generation."""

    generation: int
    live: Rows
    rows: Rows


class Base:
    """The rows of a built index, and the backend that finds among them."""

    def __init__(
        self,
        rowids: np.ndarray,
        vectors: np.ndarray,
        backend: Backend,
        info: IndexInfo | None = None,
    ) -> None:
        self.rowids = rowids
        """(N,) int64, ascending"""
        self._vectors = np.asarray(vectors)  # without what a memmap adds to every access
        self.backend = backend
        self.info = info
        self._masks: OrderedDict[Filter, _Matching] = OrderedDict()
        self._passed: weakref.WeakKeyDictionary[Rows, np.ndarray] = weakref.WeakKeyDictionary()
        self._ids: Ids | None = None
        self.plan = functools.lru_cache(self._plan)
        """(count, share) -> breadth and fetch for so many rows among a share of all"""
        self._lock = threading.Lock()
        self._loading_ids = threading.Lock()

    def __len__(self) -> int:
        return len(self.rowids)

    @property
    def embed_dim(self) -> int:
        return int(self._vectors.shape[1])

    def take(self, places: np.ndarray) -> np.ndarray:
        """Stored vectors (n, E) of places (n,); -1 is the last, as in numpy."""
        return self._vectors.take(places, axis=0)

    def _plan(self, count: int, share: float) -> tuple[int, int]:
        if self.info is None or math.isfinite(self.backend.error):
            return self.backend.max_breadth, overfetch(count)
        return self.info.plan(count, share)

    def exactly(self) -> Self:
        """The same rows, all of which a search compares."""
        if math.isfinite(self.backend.error):
            return self
        other = copy.copy(self)
        other.plan = functools.lru_cache(lambda *_: (self.backend.max_breadth, len(self)))
        return other

    def shares(self, rows: Rows, queries: np.ndarray, breadth: int, least: int) -> np.ndarray:
        """What part (Q,) of the rows near each query are among `rows`; nan if that is not known.

        The least part of any number of the lists that are searched first, from where on `least`
        rows are expected among them: if what is nearest is left out, what lies behind it is not.
        """
        if self.backend.lists is None or rows.mask is None:
            return np.full(len(queries), np.nan)
        passed = self._passed.get(rows)
        if passed is None:
            passed = self._passed[rows] = self.backend.lists.count(rows.mask)
        nearest = self.backend.lists.nearest(queries, breadth)  # (Q, B)
        seen = self.backend.lists.sizes[nearest].cumsum(axis=1)
        few = np.minimum(least * len(self) / max(1, rows.count), seen[:, -1:])
        parts = passed[nearest].cumsum(axis=1) / np.maximum(seen, 1)
        return np.asarray(np.where(seen < few, 1, parts).min(axis=1))

    def places_of(self, rowids: np.ndarray) -> np.ndarray:
        """Places of those of the row numbers that are in here."""
        places = self.locate(rowids)
        return np.asarray(places[places >= 0])

    def locate(self, rowids: np.ndarray) -> np.ndarray:
        """The place (n,) of each row number; -1 where it is not in here."""
        if not len(self.rowids):
            return np.full(len(rowids), -1)
        # Right, and one look instead of twenty, where no number is missing before it.
        places = (rowids - self.rowids[0]).clip(0, len(self.rowids) - 1)
        is_elsewhere = self.rowids[places] != rowids
        if is_elsewhere.any():
            others = rowids[is_elsewhere]
            found = self.rowids.searchsorted(others).clip(max=len(self.rowids) - 1)
            places[is_elsewhere] = np.where(self.rowids[found] == others, found, -1)
        return np.asarray(places)

    @property
    def has_ids(self) -> bool:
        return self._ids is not None

    def ids(self, collection: Collection) -> "Ids":
        """Of all rows, in memory: 8 bytes a row and the text. The first call reads them."""
        with self._loading_ids:
            if self._ids is None:
                self._ids = Ids.read(collection, self.rowids)
            return self._ids

    def matching(self, filter: Filter, columns: Columns, live: Rows, generation: int) -> Rows:
        """Those of the live rows that match; remembered for the next search with the filter.

        Rows only die, so what matched in an earlier generation and is alive matches still. What was
        found in a later one is of no use: rows that are alive here may be missing there.
        """
        with self._lock:
            known = self._masks.get(filter)
        if known is None or known.generation > generation:
            if live.mask is None:
                mask = columns.mask(filter, self.rowids)
            else:
                mask = live.mask.copy()
                mask[live.mask] = columns.mask(filter, self.rowids[live.mask])
            known = _Matching(generation, live, Rows.of(mask))
        elif known.live is not live:
            rows = Rows.of(_both(known.rows.mask, live.mask, len(self)))
            known = _Matching(generation, live, rows)
        with self._lock:
            newest = self._masks.get(filter, known)
            self._masks[filter] = max(known, newest, key=lambda one: one.generation)
            self._masks.move_to_end(filter)
            while len(self._masks) > max(1, min(_MASKS_KEPT, _MASK_BYTES // max(1, len(self)))):
                self._masks.popitem(last=False)
        return known.rows


@dataclass(frozen=True)
class Selection:
    """The rows of a view that a search is for."""

    base: Rows
    fresh: np.ndarray | None
    """bool, of the view's fresh rows; None for all"""
    num_fresh: int

    def __len__(self) -> int:
        return self.base.count + self.num_fresh


@dataclass(frozen=True)
class View:
    """The live rows of one generation that have a vector in one field."""

    generation: int
    field: str
    last_rowid: int
    """nothing above it is in here"""
    base: Base | None
    live: Rows
    """of the base"""
    fresh: ScanBackend

    @classmethod
    def load(cls, collection: Collection, field: str, device: str, generation: int) -> Self:
        """Everything anew, inside a snapshot of the generation.

        Logs why an index that is there is not used.
        """
        live = collection.rowids(field)
        base = _built(collection, field, device, generation, live)
        if base is None and device != "cpu" and len(live):
            base = _on_device(collection, field, device)
        rows, last = NO_ROWS, 0
        if base is not None and len(base):
            mask = np.zeros(len(base), dtype=bool)
            mask[base.places_of(live)] = True
            rows, last = Rows.of(mask), int(base.rowids[-1])
        empty = cls(generation, field, last, base, rows, ScanBackend(collection.embed_dim))
        return empty._with_new(collection)

    def advance(self, collection: Collection, generation: int) -> Self:
        """The view of a later generation, inside a snapshot of it.

        Reads what is new. After so many writes that it is not remembered what they deleted it reads
        all row numbers as well, about a second for ten million.
        """
        deleted = collection.deleted_since(self.generation)
        if deleted is None:
            known = [self.fresh.rowids]
            if self.base is not None:
                known.append(self.base.rowids[self.live.places])
            deleted = np.setdiff1d(np.concatenate(known), collection.rowids(self.field))
        newer = self._with_new(collection)
        live = self.live
        if self.base is not None:
            live = live.without(self.base.places_of(deleted))
        fresh = newer.fresh.remove(deleted)
        return dataclasses.replace(newer, generation=generation, live=live, fresh=fresh)

    def _with_new(self, collection: Collection) -> Self:
        fresh, last = self.fresh, self.last_rowid
        for rowids, vectors in collection.vector_blocks(last, self.field):
            fresh, last = fresh.append(rowids, vectors), int(rowids[-1])
        return dataclasses.replace(self, fresh=fresh, last_rowid=last)

    def __len__(self) -> int:
        return self.live.count + len(self.fresh)

    def exactly(self) -> Self:
        """The same, of which a search passes nothing over."""
        return dataclasses.replace(self, base=self.base.exactly()) if self.base else self

    def vectors_of(self, rowids: np.ndarray) -> np.ndarray:
        """Stored vectors (n, E) float32 of row numbers (n,) that are in here."""
        if self.base is None or not len(self.base):
            return self.fresh.vectors_of(rowids)
        is_fresh = rowids > self.base.rowids[-1]
        vectors = np.empty((len(rowids), self.base.embed_dim), dtype=np.float32)
        if not is_fresh.all():
            vectors[~is_fresh] = self.base.take(self.base.places_of(rowids[~is_fresh]))
        if is_fresh.any():
            vectors[is_fresh] = self.fresh.vectors_of(rowids[is_fresh])
        return vectors

    def ids_of(self, rowids: np.ndarray, collection: Collection) -> list[str]:
        """Ids of row numbers (n,), in their order; "" for one that is not there any more."""
        if self.base is None or not len(self.base):
            return _stored_ids(rowids, collection)
        places = self.base.locate(rowids)
        ids = self.base.ids(collection).at(places.clip(min=0))
        others = [i for i, place in enumerate(places.tolist()) if place < 0 or not ids[i]]
        if others:
            for i, id in zip(others, _stored_ids(rowids[others], collection), strict=True):
                ids[i] = id
        return ids

    def select(self, filter: Filter | None, columns: Columns) -> Selection:
        """The rows that a filter holds for; with a filter, inside a snapshot of this generation."""
        if filter is None:
            return Selection(self.live, None, len(self.fresh))
        rows = NO_ROWS
        if self.base is not None:
            rows = self.base.matching(filter, columns, self.live, self.generation)
        fresh = columns.mask(filter, self.fresh.rowids)
        return Selection(rows, fresh, int(np.count_nonzero(fresh)))


def _built(
    collection: Collection, field: str, device: str, generation: int, live: np.ndarray
) -> Base | None:
    """The index that was built, if it is there and fits."""
    found = cache.read(collection, field, generation)
    if found is None:
        return None
    before = live[: np.searchsorted(live, found.info.max_rowid, side="right")]
    if not np.isin(before, found.rowids, assume_unique=True).all():
        logger.warning(
            "the %s index of collection %s is ignored: vectors are missing in it that were there"
            " when it was built; build it again: clipserve index build %s",
            field,
            collection.name,
            collection.path,
        )
        return None
    return Base(found.rowids, found.vectors, make_backend(found, device), found.info)


def _stored_ids(rowids: np.ndarray, collection: Collection) -> list[str]:
    found = collection.ids_of(rowids)
    return [found.get(rowid, "") for rowid in rowids.tolist()]


def _on_device(collection: Collection, field: str, device: str) -> Base | None:
    """All vectors on the GPU; None where they have no room."""
    blocks = list(collection.vector_blocks(field=field))
    rowids = np.concatenate([rowids for rowids, _ in blocks])
    vectors = np.concatenate([vectors for _, vectors in blocks])
    backend = torch_exact.on_gpus(vectors, device)
    return None if backend is None else Base(rowids, vectors, backend)


def _both(one: np.ndarray | None, other: np.ndarray | None, size: int) -> np.ndarray:
    masks = [mask for mask in (one, other) if mask is not None]
    return np.logical_and.reduce(masks) if masks else np.ones(size, dtype=bool)
