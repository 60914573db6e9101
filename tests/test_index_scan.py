from dataclasses import replace

import numpy as np

from index.backends.scan import ScanBackend

DIM = 16


def unit(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Watched(np.ndarray):
    """Remembers how many rows were copied out of it."""

    copied: list[int]

    def __getitem__(self, key: object) -> np.ndarray:
        if isinstance(key, np.ndarray):
            self.copied.append(len(key))
        return np.asarray(super().__getitem__(key))  # type: ignore[call-overload]


def test_vectors_are_copied_only_where_few_of_a_block_are_wanted() -> None:
    vectors, queries = unit(400), unit(5, seed=1)
    backend = ScanBackend(DIM).append(np.arange(400), vectors).remove(np.array([7, 300]))
    watched = backend._blocks[0].vectors.view(Watched)
    watched.copied = []
    backend = ScanBackend(DIM, (replace(backend._blocks[0], vectors=watched),))
    rowids = backend.rowids
    for share, copied in ((1.0, []), (0.6, []), (0.3, []), (0.1, [40]), (0.0, [0])):
        watched.copied.clear()
        mask = np.arange(398) < round(398 * share)
        for k in (3, 200, 1000):
            scores, labels = backend.search(queries, k, 1, None if share == 1 else mask)
            truth = np.where(mask, queries @ vectors[rowids].T, -np.inf)
            order = np.argsort(-truth, axis=1, kind="stable")[:, :k]
            expected = np.take_along_axis(truth, order, axis=1)
            assert np.allclose(scores, expected, atol=1e-6)
            assert (labels == np.where(expected > -np.inf, rowids[order], -1)).all()
        assert watched.copied == copied * 3
