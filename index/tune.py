"""How far an index must be searched to find what an exact search finds.

For some k, breadth (lists, or graph candidates) and fetch (candidates that are scored again
exactly) are raised until the target recall is reached; of the settings that reach it the fastest is
taken. Queries should be texts, which lie farther from pictures than other pictures do. Start at
`tune`.

Legend: Q queries, N vectors, E embedding, F candidates.
"""

import math
import mmap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import faiss as untyped_faiss
import numpy as np

from index.backends.faiss_cpu import FaissBackend, is_graph
from index.info import Point

faiss: Any = untyped_faiss  # its stubs lack half of what is used here

MAX_QUERIES = 1024
NUM_QUERIES = 256
"""that are drawn where none are given"""

_TUNED_K = {10: 1024, 100: 256, 1000: 64}
"""k -> queries at most: ten times as many answers are as good a sample with fewer queries"""
_FILTERS = (0.5, 0.1, 0.03)
_FILTERED_QUERIES = 256
_FARTHEST_FILTERED = 64
_SPARE = 1.15
"""times the breadth that a filter took: others, and other queries, take a little more or less"""
_HALVINGS = 2
"""of the gap between a breadth that is enough and half of it, which is not"""
_LEAST_TIMED, _MOST_TIMED = 8, 64
"""queries"""
_GATHERED = 8192
"""vectors that are gathered at a time: 16 MiB at E = 512"""
_CANDIDATES = 2**20
"""of all queries together, that one measurement may look at: 8 bytes each, and four of a score"""
_EVER_MORE = 0.0005
"""less gained by twice the breadth: what is missed is lost in the codes"""
_ITSELF = 0.9999
"""a cosine: the same text or picture, however it was computed and stored"""
_CLOSE = 1e-6
"""of scores: a candidate as good as the last of the true best is as right"""
_ROWS_AT_A_TIME = 65536


@dataclass(frozen=True)
class Tuning:
    """What was measured; as `IndexInfo` has it."""

    tuned: dict[int, Point]
    filtered: dict[float, float]
    curve: list[Point] = field(default_factory=list)


def tune(index: Any, vectors: np.ndarray, queries: np.ndarray, target: float) -> Tuning:
    """Measure a FAISS index, which has the vectors (N, E) at their positions.

    queries (Q, E) float32 of unit length, `held_out` from the vectors.
    """
    backend = FaissBackend(index)
    queries = np.ascontiguousarray(queries[:MAX_QUERIES], dtype=np.float32)
    ks = [k for k in _TUNED_K if k <= len(vectors)] or [len(vectors)]
    random = np.random.default_rng(0)
    masks = {share: random.random(len(vectors)) < share for share in _FILTERS}
    bests = exact_scores(vectors, queries, ks[-1], [None, *masks.values()])
    curve, tuned = [], {}
    for k in ks:
        asked = queries[: _TUNED_K.get(k, NUM_QUERIES)]
        measure = _Measure(backend, vectors, asked, bests[0][: len(asked), k - 1])
        points = measure.curve(k, target)
        tuned[k] = _cheapest(points, target)
        curve += points
    k, filtered = ks[0], {}
    for (share, mask), best in zip(masks.items(), bests[1:], strict=True):
        asked = queries[:_FILTERED_QUERIES]
        if mask.sum() >= k:
            measure = _Measure(backend, vectors, asked, best[: len(asked), k - 1], mask)
            filtered[share] = measure.multiple(tuned[k], min(target, tuned[k]["recall"]))
    return Tuning(tuned, filtered, curve)


def exact_scores(
    vectors: np.ndarray, queries: np.ndarray, k: int, masks: Sequence[np.ndarray | None]
) -> list[np.ndarray]:
    """For each mask of the vectors the best scores (Q, k) in order; -inf where there are fewer."""
    bests = [np.full((len(queries), k), -np.inf, dtype=np.float32) for _ in masks]
    for start, block in blocks(vectors):
        for i, mask in enumerate(masks):
            own = block if mask is None else block[mask[start : start + len(block)]]
            if len(own):
                scores, _ = faiss.knn(
                    queries, own, min(k, len(own)), metric=faiss.METRIC_INNER_PRODUCT
                )
                both = np.concatenate([bests[i], scores], axis=1)
                bests[i] = -np.sort(-both, axis=1)[:, :k]
    return bests


def held_out(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """The queries (Q, E) that are no stored vector, as a caption that is embedded again would be.

    A stored vector as its own query always finds itself, and so more than others do.
    """
    (nearest,) = exact_scores(vectors, np.ascontiguousarray(queries), 1, [None])
    return queries[nearest[:, 0] < _ITSELF]


def noisy_copies(vectors: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Queries at a cosine of about 0.7 to stored vectors, for want of better ones."""
    noise = random.standard_normal(vectors.shape, dtype=np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    queries = vectors + noise
    return np.ascontiguousarray(queries / np.linalg.norm(queries, axis=1, keepdims=True))


def blocks(vectors: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(start, vectors (n, E) float32) one after the other, of an array mapped into memory or not.

    What was read is not kept in this process's memory.
    """
    for start in range(0, len(vectors), _ROWS_AT_A_TIME):
        yield start, np.array(vectors[start : start + _ROWS_AT_A_TIME], dtype=np.float32)
        release(vectors)


def gather(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some rows (n,) of an array mapped into memory or not, (n, E) float32."""
    found = np.empty((len(rows), vectors.shape[1]), dtype=np.float32)
    for start in range(0, len(rows), _GATHERED):
        some = slice(start, start + _GATHERED)
        found[some] = vectors[rows[some]]
        release(vectors)
    return found


def release(vectors: np.ndarray) -> None:
    """Let go of the pages of a file that were read; they are read again when they are needed."""
    mapped = getattr(vectors, "_mmap", None)
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)


class _Measure:
    """Searches with given queries, of which the last score (Q,) of the true best is known."""

    def __init__(
        self,
        backend: FaissBackend,
        vectors: np.ndarray,
        queries: np.ndarray,
        last: np.ndarray,
        mask: np.ndarray | None = None,
    ) -> None:
        self._backend = backend
        self._vectors = vectors
        self._stored = np.asarray(vectors)  # without what a memmap adds to every access
        self._queries = queries
        self._last = last
        self._mask = mask

    def curve(self, k: int, target: float) -> list[Point]:
        """Breadths doubled until more is not worth it, then those between that are enough."""
        fetches = self._fetches(k)
        enough: set[int] = set()  # fetches that have reached the target
        points: list[Point] = []
        breadth, most = self._least_breadth(fetches[0]), -1.0
        while True:
            recalls = self.recalls(k, breadth, fetches)
            gained, most = recalls[-1] - most, recalls[-1]
            reached = {f for f, recall in zip(fetches, recalls, strict=True) if recall >= target}
            # Timed is the fewest that are newly enough (more take longer, though less than a timing
            # may be off), or else that find as much as any do, for the curve.
            few = fetches[int(np.argmax(np.array(recalls) >= most - _EVER_MORE))]
            fetch = min(reached - enough, default=few)
            points.append(self._point(k, breadth, fetch, recalls[fetches.index(fetch)]))
            enough |= reached
            is_done = fetches[0] in enough or most >= max(target, 0.99) or gained < _EVER_MORE
            if is_done or breadth >= self._backend.max_breadth:
                return points + self._between(k, points, target)
            breadth = min(2 * breadth, self._backend.max_breadth)

    def multiple(self, point: Point, target: float) -> float:
        """How many times the breadth a filter takes that lets the mask through."""

        def is_enough(factor: float) -> bool:
            breadth = math.ceil(factor * point["breadth"])
            return self.recalls(point["k"], breadth, [point["fetch"]])[0] >= target

        factor, most = 1.0, min(_FARTHEST_FILTERED, self._backend.max_breadth / point["breadth"])
        while factor < most and not is_enough(factor):
            factor *= 2
        too_little = factor / 2
        for _ in range(_HALVINGS if factor > 1 else 0):
            middle = (too_little + factor) / 2
            too_little, factor = (too_little, middle) if is_enough(middle) else (middle, factor)
        return _SPARE * factor

    def recalls(self, k: int, breadth: int, fetches: list[int]) -> list[float]:
        """For each number of candidates that are taken; one search, the others are its starts."""
        found = np.zeros((len(self._queries), len(fetches)))
        step = max(1, _CANDIDATES // fetches[-1])
        for start in range(0, len(self._queries), step):
            rows = slice(start, start + step)
            _, labels = self._backend.search(self._queries[rows], fetches[-1], breadth, self._mask)
            scores = self._score(self._queries[rows], labels)
            is_best = scores >= self._last[rows, None] - _CLOSE
            for column, fetch in enumerate(fetches):
                found[rows, column] = is_best[:, :fetch].sum(axis=1).clip(max=k) / k
        return [float(recall) for recall in found.mean(axis=0)]

    def _between(self, k: int, points: list[Point], target: float) -> list[Point]:
        """Halfway, and halfway again, below the breadth of the cheapest that was enough."""
        best = _cheapest(points, target)
        if best["recall"] < target:
            return []
        found, enough, too_little = [], best["breadth"], best["breadth"] // 2
        fetches = self._fetches(k)
        for _ in range(_HALVINGS):
            breadth = (enough + too_little) // 2
            if breadth in (enough, too_little) or breadth < self._least_breadth(fetches[-1]):
                break
            recalls = self.recalls(k, breadth, fetches)
            reached = [i for i, recall in enumerate(recalls) if recall >= target]
            column = min(reached, default=fetches.index(best["fetch"]))
            found.append(self._point(k, breadth, fetches[column], recalls[column]))
            enough, too_little = (breadth, too_little) if reached else (enough, breadth)
        return found

    def _point(self, k: int, breadth: int, fetch: int, recall: float) -> Point:
        ms = self._milliseconds(breadth, fetch)
        return {
            "k": k,
            "breadth": breadth,
            "fetch": fetch,
            "recall": round(recall, 4),
            "ms": round(ms, 4),
        }

    def _milliseconds(self, breadth: int, fetch: int) -> float:
        """A query, the faster of two runs, with its candidates scored exactly."""
        queries = self._queries[: max(_LEAST_TIMED, min(_MOST_TIMED, _GATHERED // fetch))]
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            _, labels = self._backend.search(queries, fetch, breadth, self._mask)
            self._products(queries, labels)
            seconds.append(time.perf_counter() - started)
        release(self._vectors)
        return min(seconds) * 1000 / len(queries)

    def _score(self, queries: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Cosines (Q, F) of candidates; -inf for the label -1."""
        scores = np.empty(labels.shape, dtype=np.float32)
        step = max(1, _GATHERED // max(1, labels.shape[1]))
        for start in range(0, len(queries), step):
            rows = slice(start, start + step)
            scores[rows] = self._products(queries[rows], labels[rows])
            release(self._vectors)
        return np.where(labels >= 0, scores, -np.inf)

    def _products(self, queries: np.ndarray, labels: np.ndarray) -> np.ndarray:
        vectors = self._stored.take(labels.ravel(), axis=0).reshape(*labels.shape, -1)  # (Q, F, E)
        products = vectors.astype(np.float32, copy=False) @ queries[:, :, None]
        return np.asarray(products[..., 0])

    def _fetches(self, k: int) -> list[int]:
        """Numbers of candidates to try, ascending; the coarser the codes the more."""
        name = type(self._backend.index).__name__
        factors = [1.0]
        if "ScalarQuantizer" in name or "SQ" in name:
            factors = [1.25, 2, 4]
        elif "RaBitQ" in name or "PQ" in name:
            factors = [2, 4, 8, 16, 32]
        most = min(len(self._vectors), max(8 * k, _CANDIDATES // len(self._queries)))
        return sorted({min(most, math.ceil(factor * k) + 6) for factor in factors})

    def _least_breadth(self, fetch: int) -> int:
        """A graph's search keeps at least as many candidates as it is to return."""
        if not is_graph(self._backend.index):
            return 1
        return min(fetch, self._backend.max_breadth)


def _cheapest(points: list[Point], target: float) -> Point:
    """The fastest that reaches the target; without one the best."""
    enough = [point for point in points if point["recall"] >= target]
    if enough:
        return min(enough, key=lambda point: point["ms"])
    return max(points, key=lambda point: (point["recall"], -point["ms"]))
