"""What searches are compared with: a collection whose every item is known, and numpy."""

from pathlib import Path

import numpy as np

from index.collection import Collection
from index.filters import parse
from index.items import Item
from index.search import Searcher

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
    """A collection beside a dictionary that says what must be found in it; closes its searchers."""

    def __init__(self, path: Path, dtype: str = "float32") -> None:
        self.collection = Collection.create(
            path, fingerprint="a" * 64, model_name="tiny", embed_dim=DIM, dtype=dtype
        )
        self.vectors: dict[str, np.ndarray] = {}
        self.numbers: dict[str, int] = {}
        self._written = 0
        self._searchers: list[Searcher] = []

    def searcher(self) -> Searcher:
        """A new one."""
        path = self.collection.path
        self._searchers.append(Searcher(path, fingerprint="a" * 64, device="cpu"))
        return self._searchers[-1]

    def close(self) -> None:
        for searcher in self._searchers:
            searcher.close()
        self.collection.close()

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
