"""The best rows of a view that are not similar to a better one. Start at `distinct`.

Legend: Q queries, E embedding, n rows.
"""

from typing import NamedTuple

import numpy as np

from index.rank import Ids, best
from index.view import Selection, View

_LOOKED_AT = 10_000
"""of the best, in which enough are looked for that are not similar to each other"""
_FARTHER = 4
"""times as many of the best, each time there were not enough among them"""
_COMPARED_AT_A_TIME = 256


class Similar(NamedTuple):
    """What `distinct` leaves out."""

    least: float
    """cosine from which on two rows show the same"""
    left_out: np.ndarray
    """(n,) row numbers that are no answer, and take no other's place"""
    min_score: float
    """below it nothing is looked for"""


def distinct(
    view: View,
    chosen: Selection,
    queries: np.ndarray,
    count: int,
    similar: Similar,
    ids_of: Ids,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each query the best `count` rows (n,) that are not similar to a better one, and scores.

    Looks farther until there are so many, or no more rows, or _LOOKED_AT were not enough.
    """
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    unsettled = list(range(len(queries)))
    looked_at = 2 * count + len(similar.left_out)
    most = min(max(looked_at, _LOOKED_AT), len(chosen))
    while unsettled:
        ranked = best(view, chosen, queries[unsettled], looked_at, ids_of)
        for row, rowids, scores in zip(unsettled, *ranked, strict=True):
            is_all = looked_at >= most or scores[-1] < similar.min_score
            is_worth = (scores >= similar.min_score) & ~np.isin(rowids, similar.left_out)
            rowids, scores = rowids[is_worth], scores[is_worth]
            kept = _dissimilar(view, rowids, similar.least, count)
            if is_all or len(kept) == count:
                found[row] = rowids[kept], scores[kept]
        unsettled = [row for row in unsettled if row not in found]
        looked_at = min(looked_at * _FARTHER, most)
    return [found[row] for row in range(len(queries))]


def _dissimilar(view: View, rowids: np.ndarray, least: float, count: int) -> np.ndarray:
    """Places of the first `count` of rows (n,) that are not similar to one taken before."""
    taken = np.zeros((0, 1))
    kept: list[int] = []
    for start in range(0, len(rowids), _COMPARED_AT_A_TIME):
        vectors = view.vectors_of(rowids[start : start + _COMPARED_AT_A_TIME]).astype(np.float64)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        taken = taken if len(taken) else vectors[:0]
        is_out = np.asarray(_are_similar(vectors, taken, least).any(axis=1))
        among = _are_similar(vectors, vectors, least)
        new = []
        for place in range(len(vectors)):
            if not is_out[place]:
                new.append(place)
                is_out |= among[place]
        taken = np.concatenate([taken, vectors[new]])
        kept += [start + place for place in new]
        if len(kept) >= count:
            break
    return np.array(kept[:count], dtype=np.int64)


def _are_similar(one: np.ndarray, other: np.ndarray, least: float) -> np.ndarray:
    """(n, m) bool; cosines are rounded to float32, in which a vector's to itself is 1."""
    return np.asarray((one @ other.T).astype(np.float32) >= least)
