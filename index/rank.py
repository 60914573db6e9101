"""The best rows of a view, exactly scored, and the proof that none was passed over.

A backend proposes rows by approximate scores; each is scored again from its stored vector, and the
search goes farther while a row that was not proposed could still be as good as the last of the
best. An approximate index cannot say so; how far it is searched was tuned with filters that have
nothing to do with the query. Where a filter leaves out what is near, that is not far enough, so the
search goes on until going farther finds nothing better: of lists, where it lets through fewer of
the rows near the query than of all; of a graph, which cannot tell, always. Start at `best`.

Legend: Q queries, C candidates of each, E embedding, N rows of the base, n rows.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from index.backends.scan import float32_error
from index.info import overfetch
from index.view import Base, Rows, Selection, View

SCAN_ROWS = 20_000
"""chosen rows up to which each is compared and no index is asked

2 % of 1M vectors, E = 512, chosen at random, 64 queries on two cores that were busy besides: 0.25 s
and nothing missed; IVF4096,SQ8 searching 128 lists took 0.09 s and found 68 %.
"""

_FARTHER = 4
"""each time a search was not enough; what it found is found again"""
_FARTHEST = 65536
"""candidates of a query, after which all rows are compared"""
_ENOUGH = 0.75
"""of the candidates, when the others turned out to be deleted"""
_AS_MANY = 0.5
"""of the rows near a query, by what a filter lets through of all: half of it takes about an eighth
more breadth (1M vectors, IVF4096,SQ8), and how much a few lists have of it varies"""
_EXPECTED = 2
"""times as many as are wanted are expected in the first lists of which that part can be told"""
_MOSTLY = 0.95
"""of the base: where so much is alive, the dead are cheaper met than left out"""
_VECTORS_AT_A_TIME = 512
"""1 MiB at E = 512: they stay in a core's cache from one look at them to the next"""
_FEW = 256
"""candidates that float64 has scored before float32 has told which are worth it"""
_BLOCK_ROWS = 8192
_SCORES_AT_A_TIME = 2**25
"""of queries by rows, where all rows could turn out to be equally good"""

Ids = Callable[[np.ndarray], dict[int, str]]
"""row numbers -> ids"""


class Ranked(NamedTuple):
    """Rows of each query, best first; all queries have equally many."""

    rowids: np.ndarray
    """(Q, n) int64"""
    scores: np.ndarray
    """(Q, n) float32, cosines"""


class _Candidates(NamedTuple):
    rowids: np.ndarray
    """(Q, C) int64"""
    scores: np.ndarray
    """(Q, C) float32; -inf for none, and for those that are not among the best for certain"""
    limits: np.ndarray
    """(Q,) that no row passed over can exceed, as far as its backend knows; -inf for none"""
    is_unsure: np.ndarray
    """(Q,) bool: only a part of the base was searched, and not tuned for what was chosen there"""


def best(view: View, chosen: Selection, queries: np.ndarray, count: int, ids_of: Ids) -> Ranked:
    """The `count` chosen rows, or all of them, of the largest exact scores; equal ones by id.

    queries (Q, E) float64 of unit length. Looks again, farther, for the queries where too few
    candidates were found, where one passed over could be as good as the last of the best, or where
    a filtered search of an approximate index found better ones than before.
    """
    count = min(count, len(chosen))
    if not count:
        return Ranked(np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), "f4"))
    never = np.full(len(queries), -np.inf, np.float32)
    found, last, settled = _settle(view, chosen, queries, count, 1, never)
    if settled.all():
        return _order(found.rowids, found.scores, count, ids_of)
    ranked = Ranked(
        np.empty((len(queries), count), np.int64), np.empty((len(queries), count), np.float32)
    )
    rows, widening = np.arange(len(queries)), 1
    while True:
        if settled.any():
            some = _order(found.rowids[settled], found.scores[settled], count, ids_of)
            ranked.rowids[rows[settled]], ranked.scores[rows[settled]] = some
        rows, last = rows[~settled], last[~settled]
        if not len(rows):
            return ranked
        widening *= _FARTHER
        found, last, settled = _settle(view, chosen, queries[rows], count, widening, last)


def _settle(
    view: View,
    chosen: Selection,
    queries: np.ndarray,
    count: int,
    widening: int,
    before: np.ndarray,
) -> tuple[_Candidates, np.ndarray, np.ndarray]:
    """Candidates, the score (Q,) of the last of the best, and which queries (Q,) are done.

    Those of which the best are certainly, or as tuned, among the candidates; where neither is sure
    those of which the last is no better than it was `before` (Q,).
    """
    found = _candidates(view, chosen, queries, count, widening)
    last = _kth(found.scores, count)
    settled = (last > found.limits) & (last > -np.inf) & (~found.is_unsure | (last <= before))
    return found, last, settled


def _candidates(
    view: View, chosen: Selection, queries: np.ndarray, count: int, widening: int
) -> _Candidates:
    parts = []
    queries32 = queries.astype(np.float32)
    base, fresh = view.base, view.fresh
    if base is not None and chosen.base.count:
        places, limits, is_unsure = _search_base(base, chosen.base, queries32, count, widening)
        scores = _score(base.take, places, queries, queries32, count)
        parts.append(_Candidates(base.rowids[places], scores, limits, is_unsure))
    if chosen.num_fresh:
        fetch = min(overfetch(count) * widening, chosen.num_fresh)
        found, rowids = fresh.search(queries32, fetch, 1, chosen.fresh)
        limits = np.full(len(queries), -np.inf)
        if fetch < chosen.num_fresh:
            limits = found[:, -1] + fresh.error
        scores = _score(fresh.vectors_of, rowids, queries, queries32, count)
        parts.append(_Candidates(rowids, scores, limits, np.zeros(len(queries), dtype=bool)))
    if len(parts) == 1:
        return parts[0]
    return _Candidates(
        np.concatenate([part.rowids for part in parts], axis=1),
        np.concatenate([part.scores for part in parts], axis=1),
        np.maximum(parts[0].limits, parts[1].limits),
        parts[0].is_unsure,
    )


def _search_base(
    base: Base, rows: Rows, queries: np.ndarray, count: int, widening: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places (Q, C) of candidates among the chosen rows, or -1, limits (Q,), `is_unsure` (Q,)."""
    backend, size = base.backend, len(base)
    breadth, fetch = base.plan(count, rows.count / size)
    breadth, fetch = min(breadth * widening, backend.max_breadth), fetch * widening
    is_mostly = rows.count >= _MOSTLY * size
    is_narrow = rows.count <= SCAN_ROWS and not is_mostly
    no_limits, sure = np.full(len(queries), -np.inf), np.zeros(len(queries), dtype=bool)
    if is_narrow or fetch >= rows.count or fetch > _FARTHEST:
        return _scan(base, rows, queries, count), no_limits, sure
    if rows.mask is not None and is_mostly and widening == 1:
        # Few are dead: to meet them costs less than a selector that every row is looked up in.
        asked = math.ceil(fetch * size / rows.count)
        scores, places = backend.search(queries, asked, breadth)
    else:
        scores, places = backend.search(queries, fetch, breadth, rows.mask)
    is_cut = places[:, -1] >= 0  # else there was no more, as when the breadth was tuned
    is_starved = sure
    if rows.mask is not None:
        # Of a masked search too: whatever a backend makes of a mask, what is deleted is no hit.
        is_chosen = (places >= 0) & rows.mask[places]
        is_starved = is_cut & (is_chosen.sum(axis=1) < _ENOUGH * fetch)
        places = np.where(is_chosen, places, -1)
    if math.isfinite(backend.error):
        last = np.where(is_cut, scores[:, -1], 0)
        return places, np.where(is_cut, last + backend.errors(queries, last), -np.inf), sure
    limits = np.where(is_starved, np.inf, -np.inf)
    if is_mostly or breadth >= backend.max_breadth:
        return places, limits, sure
    shares = base.shares(rows, queries, breadth, _EXPECTED * count)
    return places, limits, ~(shares >= _AS_MANY * rows.count / size)


def _scan(base: Base, rows: Rows, queries: np.ndarray, count: int) -> np.ndarray:
    """Places (Q, C), padded with -1: all that may be among the best `count` of the chosen rows."""
    step = max(1, _SCORES_AT_A_TIME // rows.count)
    parts = [
        _scan_some(base, rows, queries[start : start + step], count)
        for start in range(0, len(queries), step)
    ]
    width = max(part.shape[1] for part in parts)
    widen = [((0, 0), (0, width - part.shape[1])) for part in parts]
    padded = [np.pad(part, by, constant_values=-1) for part, by in zip(parts, widen, strict=True)]
    return np.concatenate(padded)


def _scan_some(base: Base, rows: Rows, queries: np.ndarray, count: int) -> np.ndarray:
    """A block of rows is compared at a time; what could be as good as the best so far is kept."""
    margin = 2 * float32_error(queries.shape[1])
    best = np.empty((len(queries), 0), np.float32)
    threshold = np.full((len(queries), 1), -np.inf, np.float32)
    who, where, what = [], [], []
    places = rows.places
    for start in range(0, len(places), _BLOCK_ROWS):
        block = places[start : start + _BLOCK_ROWS]
        scores = queries @ base.take(block).astype(np.float32, copy=False).T  # (Q, n)
        best = np.concatenate([best, scores], axis=1)
        if best.shape[1] > count:
            best = np.partition(best, -count, axis=1)[:, -count:]
            threshold = best.min(axis=1, keepdims=True) - margin
        query, column = np.nonzero(scores >= threshold)
        who.append(query)
        where.append(block[column])
        what.append(scores[query, column])
    query, place = np.concatenate(who), np.concatenate(where)
    kept = np.concatenate(what) >= threshold[query, 0]
    return _to_rows(query[kept], place[kept], len(queries))


def _to_rows(query: np.ndarray, place: np.ndarray, num_queries: int) -> np.ndarray:
    """Pairs -> (Q, C), the places of each query from the left, then -1."""
    order = np.argsort(query, kind="stable")
    query, place = query[order], place[order]
    counts = np.bincount(query, minlength=num_queries)
    column = np.arange(len(query)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = np.full((num_queries, counts.max(initial=0)), -1, dtype=np.int64)
    rows[query, column] = place
    return rows


def _score(
    take: Callable[[np.ndarray], np.ndarray],
    labels: np.ndarray,
    queries: np.ndarray,
    queries32: np.ndarray,
    count: int,
) -> np.ndarray:
    """Exact cosines (Q, C) of candidates, from their stored vectors; -inf where the label is -1.

    Summed in float64, each in the same order, and then rounded: equal vectors have equal scores.
    What is behind the best `count` for certain may be -inf as well.
    """
    scores = np.full(labels.shape, -np.inf, np.float32)
    is_there = labels >= 0
    step = max(1, _VECTORS_AT_A_TIME // max(1, labels.shape[1]))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        own, wanted = labels[rows], is_there[rows]
        if own.size > _FEW:
            rough = _rough(take, own, queries32[rows])
            rough[~wanted] = -np.inf
            margin = 2 * float32_error(queries.shape[1])
            wanted &= rough >= _kth(rough, count)[:, None] - margin
        query, column = wanted.nonzero()
        for first in range(0, len(query), _VECTORS_AT_A_TIME):
            pairs = slice(first, first + _VECTORS_AT_A_TIME)
            who = query[pairs]
            vectors = take(own[who, column[pairs]]).astype(np.float64)
            exact = np.einsum("ne,ne->n", vectors, queries[rows][who])
            scores[rows][who, column[pairs]] = exact.clip(-1, 1)
    return scores


def _rough(
    take: Callable[[np.ndarray], np.ndarray], labels: np.ndarray, queries: np.ndarray
) -> np.ndarray:
    """Cosines (q, C) in float32, which are faster; of any row for a -1."""
    scores = np.empty(labels.shape, np.float32)
    step = max(1, _VECTORS_AT_A_TIME // len(labels))
    for start in range(0, labels.shape[1], step):
        own = labels[:, start : start + step]
        vectors = take(own.ravel()).astype(np.float32, copy=False)
        vectors = vectors.reshape(*own.shape, -1)  # (q, c, E)
        scores[:, start : start + step] = np.einsum("qce,qe->qc", vectors, queries)
    return scores


def _order(rowids: np.ndarray, scores: np.ndarray, count: int, ids_of: Ids) -> Ranked:
    """The best `count` of candidates (Q, C); equals, also those at the last place, by their ids."""
    rows = np.arange(len(scores))[:, None]
    order = (-scores).argsort(axis=1)[:, : count + 1]
    found = scores[rows, order]
    best = Ranked(rowids[rows, order[:, :count]], found[:, :count])
    tied = (found[:, 1:] == found[:, :-1]).any(axis=1).nonzero()[0]
    if len(tied):
        _untie(best, rowids, scores, tied, ids_of)
    return best


def _untie(
    best: Ranked, rowids: np.ndarray, scores: np.ndarray, tied: np.ndarray, ids_of: Ids
) -> None:
    """Order what is equal in those queries anew, and choose who of them is the last of the best."""
    contenders = [np.flatnonzero(scores[row] >= best.scores[row, -1]) for row in tied]
    equals = [rowids[row, columns] for row, columns in zip(tied, contenders, strict=True)]
    ids = ids_of(np.unique(np.concatenate(equals)))
    for row, columns, own in zip(tied, contenders, equals, strict=True):
        pairs = zip((-scores[row, columns]).tolist(), own.tolist(), strict=True)
        ordered = sorted((score, ids[rowid], rowid) for score, rowid in pairs)
        best.rowids[row] = [rowid for *_, rowid in ordered[: best.rowids.shape[1]]]


def _kth(scores: np.ndarray, count: int) -> np.ndarray:
    """The `count`-th largest score (Q,) of each query; -inf where there are fewer."""
    if scores.shape[1] < count:
        return np.full(len(scores), -np.inf, np.float32)
    if scores.shape[1] == count:
        return np.asarray(scores.min(axis=1))
    scores = scores.copy()
    scores.partition(-count, axis=1)
    return scores[:, -count]
