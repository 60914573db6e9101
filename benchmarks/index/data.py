"""What benchmarks/index searches: vectors like CLIP's pictures, and queries like its texts.

Pictures lie in clusters of very different sizes around one direction, texts around another one
(the modality gap, arXiv:2203.02053), and a text shares only a part of its meaning with any picture:
its cosine is about 0.33 to the best and 0.16 to any, where two pictures have 0.44. Everything is
made once, from seeds, and kept in a folder. Start at `Data.make`.

Legend: N vectors, Q queries, E embedding.
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

K = 10
NUM_QUERIES = 1024
BUCKETS = 10_000
"""values of the metadata that is filtered by"""
SHARES = (0.5, 0.1, 0.01, 0.001)
"""of the vectors, that the filters let through"""
ROWS_AT_A_TIME = 65536

_PER_CLUSTER = 200
_DECAY = 0.4
"""of the spread along the i-th direction: i ** -0.4; real embeddings have few strong directions"""
_OF_CLUSTER, _SHARED = 0.65, 0.4
"""how much of a meaning its cluster's centre is; how much of a text's meaning pictures can have"""
_GAP, _GAP_COSINE = 0.65, 0.35
"""length of the part that all of one kind have in common; the cosine of pictures' to texts' """


@dataclass(frozen=True)
class Data:
    """N vectors of E numbers in a folder, with queries and what they should find."""

    folder: Path
    count: int
    dim: int

    @property
    def collection(self) -> Path:
        return self.folder / "collection"

    def vectors(self) -> np.ndarray:
        """(N, E) float32, mapped."""
        return np.asarray(np.load(self.folder / "vectors.npy", mmap_mode="r"))

    def buckets(self) -> np.ndarray:
        """(N,) int64, uniform below BUCKETS."""
        return np.random.default_rng(3).integers(0, BUCKETS, self.count)

    def queries(self, name: str = "test") -> np.ndarray:
        """(Q, E) float32: "test", or the others that indexes are tuned with, "tuning"."""
        return np.asarray(np.load(self.folder / f"{name}.npy"))

    def truth(self, share: float = 1) -> np.ndarray:
        """(Q, K) places of the best vectors in a bucket below share * BUCKETS."""
        return np.asarray(np.load(self.folder / f"truth-{share:g}.npy"))

    def make(self) -> dict[str, Any]:
        """What is missing of it; returns what it is like."""
        described = self.folder / "data.json"
        if not described.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            found = self._make_vectors() | self._make_truth()
            described.write_text(json.dumps(found | self._fill_collection(), indent=1))
        read: dict[str, Any] = json.loads(described.read_text())
        return read

    def _make_vectors(self) -> dict[str, Any]:
        started = time.monotonic()
        world = _World(self.count, self.dim)
        shape = (self.count, self.dim)
        path = self.folder / "vectors.npy"
        vectors = np.lib.format.open_memmap(path, "w+", np.dtype("f4"), shape)
        for start in range(0, self.count, ROWS_AT_A_TIME):
            num = min(ROWS_AT_A_TIME, self.count - start)
            vectors[start : start + num] = world.images(num, np.random.default_rng([1, start]))
        vectors.flush()
        for seed, name in enumerate(("test", "tuning")):
            queries = world.texts(NUM_QUERIES, np.random.default_rng([2, seed]))
            np.save(self.folder / f"{name}.npy", queries)
        return {"clusters": world.num_clusters, "vectors_s": round(time.monotonic() - started, 1)}

    def _make_truth(self) -> dict[str, Any]:
        import faiss  # not there in a peer's environment, which only reads

        started = time.monotonic()
        queries, vectors, buckets = self.queries(), self.vectors(), self.buckets()
        cosines: dict[str, float] = {}
        for share in (1, *SHARES):
            scores = np.full((len(queries), K), -np.inf, np.float32)
            labels = np.full((len(queries), K), -1)
            for start in range(0, self.count, ROWS_AT_A_TIME):
                own = buckets[start : start + ROWS_AT_A_TIME] < share * BUCKETS
                places = start + np.flatnonzero(own)
                if len(places):
                    block = np.ascontiguousarray(vectors[places])
                    metric = faiss.METRIC_INNER_PRODUCT
                    some, columns = faiss.knn(queries, block, min(K, len(block)), metric=metric)
                    scores = np.concatenate([scores, some], axis=1)
                    labels = np.concatenate([labels, places[columns]], axis=1)
                    order = np.argsort(-scores, axis=1)[:, :K]
                    scores = np.take_along_axis(scores, order, axis=1)
                    labels = np.take_along_axis(labels, order, axis=1)
            np.save(self.folder / f"truth-{share:g}.npy", labels)
            if share == 1:
                few = vectors[: 4 * NUM_QUERIES]
                cosines = {
                    "query_to_best": float(scores[:, 0].mean()),
                    "query_to_tenth": float(scores[:, -1].mean()),
                    "nearest_of_any_query": float(scores[:, 0].max()),
                    "query_to_any": float((queries @ few.T).mean()),
                    "vector_to_any": float((few[:NUM_QUERIES] @ few[NUM_QUERIES:].T).mean()),
                }
        return {
            "cosines": {name: round(value, 3) for name, value in cosines.items()},
            "truth_s": round(time.monotonic() - started, 1),
        }

    def _fill_collection(self) -> dict[str, Any]:
        from index.collection import Collection, Item

        started = time.monotonic()
        vectors, buckets = self.vectors(), self.buckets()
        model = {"fingerprint": "0" * 64, "model_name": "none", "embed_dim": self.dim}
        with Collection.create(self.collection, **model) as collection:  # type: ignore[arg-type]
            for start in range(0, self.count, 2048):
                rows = slice(start, min(start + 2048, self.count))
                items = [
                    Item(str(place), metadata={"bucket": int(buckets[place])})
                    for place in range(rows.start, rows.stop)
                ]
                collection.upsert(items, vectors[rows])
        return {
            "collection_s": round(time.monotonic() - started, 1),
            "collection_bytes_per_vector": round(size_of(self.collection) / self.count),
        }


class _World:
    """The clusters, and the directions that pictures and texts have in common."""

    def __init__(self, count: int, dim: int) -> None:
        random = np.random.default_rng(0)
        self.num_clusters = max(64, count // _PER_CLUSTER)
        self._dim = dim
        self._spread = np.arange(1, dim + 1, dtype=np.float32) ** -_DECAY
        self._spread /= np.linalg.norm(self._spread)
        self._basis = np.linalg.qr(random.standard_normal((dim, dim)))[0].astype(np.float32)
        themes = self._meanings(max(8, int(self.num_clusters**0.5)), random)
        own = self._meanings(self.num_clusters, random)
        self._centres = _unit(0.6 * themes[random.integers(0, len(themes), len(own))] + 0.8 * own)
        weights = random.lognormal(0, 1, len(own))
        self._weights = weights / weights.sum()
        one, other = _unit(random.standard_normal((2, dim)).astype(np.float32))
        other = _unit(other - (other @ one) * one)
        self._image = one
        self._text = _GAP_COSINE * one + _rest(_GAP_COSINE) * other

    def images(self, num: int, random: np.random.Generator) -> np.ndarray:
        return _unit(_GAP * self._image + _rest(_GAP) * self._clustered(num, random))

    def texts(self, num: int, random: np.random.Generator) -> np.ndarray:
        other = _unit(random.standard_normal((num, self._dim), dtype=np.float32))
        meaning = _SHARED * self._clustered(num, random) + _rest(_SHARED) * other
        return _unit(_GAP * self._text + _rest(_GAP) * meaning)

    def _clustered(self, num: int, random: np.random.Generator) -> np.ndarray:
        centres = self._centres[random.choice(self.num_clusters, num, p=self._weights)]
        own = self._meanings(num, random)
        return np.asarray(_unit(_OF_CLUSTER * centres + _rest(_OF_CLUSTER) * own) @ self._basis)

    def _meanings(self, num: int, random: np.random.Generator) -> np.ndarray:
        """(num, E), of a length of about 1."""
        return np.asarray(random.standard_normal((num, self._dim), dtype=np.float32) * self._spread)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all in a folder; what is only linked to is not in it."""
    files = [path, *path.rglob("*")]
    return sum(f.stat().st_size for f in files if f.is_file() and not f.is_symlink())


def _unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


def _rest(part: float) -> float:
    """The length of what is at right angles to a part of a unit vector."""
    return float((1 - part * part) ** 0.5)
