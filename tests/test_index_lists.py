import faiss
import numpy as np
import pytest
import torch

from index import lists
from index.lists import assign, train


def unit(count: int, seed: int = 0, dim: int = 16) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def around(centers: np.ndarray, count: int) -> np.ndarray:
    random = np.random.default_rng(3)
    vectors = np.repeat(centers, count, axis=0)
    vectors += 0.05 * random.standard_normal(vectors.shape, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def fit(vectors: np.ndarray, centers: np.ndarray) -> float:
    """Mean cosine of a vector to the center of its list."""
    return float((vectors @ centers.T).max(axis=1).mean())


def test_a_vector_goes_to_the_center_it_is_closest_to() -> None:
    centers, vectors = unit(50), unit(3000, seed=1)
    found, scores = assign(vectors, centers), vectors @ centers.T
    assert found.dtype == np.int64
    chosen = np.take_along_axis(scores, found[:, None], axis=1)[:, 0]
    assert (chosen >= scores.max(axis=1) - 0.03).all()  # bf16 may take the second of two equals
    assert (found == scores.argmax(axis=1)).mean() > 0.95


def test_centers_lie_amid_their_vectors() -> None:
    vectors = around(unit(8, dim=64), 50)
    centers = train(vectors, 8, np.random.default_rng(0))
    assert np.allclose(np.linalg.norm(centers, axis=1), 1, atol=1e-5)
    sizes = np.bincount(assign(vectors, centers), minlength=8)
    assert sizes.sum() == 400
    assert fit(vectors, centers) > 0.7


def test_they_fit_as_well_as_those_of_faiss() -> None:
    vectors = np.concatenate([around(unit(100, dim=32), 30), unit(3000, seed=4, dim=32)])
    kmeans = faiss.Kmeans(32, 64, niter=10, spherical=True, min_points_per_centroid=1)
    kmeans.train(vectors)
    centers = train(vectors, 64, np.random.default_rng(0))
    assert fit(vectors, centers) > fit(vectors, kmeans.centroids) - 0.02


def test_no_list_stays_empty_while_another_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = around(unit(4, dim=64), 100)
    vectors[:300] = vectors[0]  # most centers are drawn from equal vectors
    centers = train(vectors, 16, np.random.default_rng(0))
    sizes = np.bincount(assign(vectors, centers), minlength=16)
    assert (sizes > 0).sum() >= 4
    monkeypatch.setattr(lists, "_split", lambda sums, sizes: sums)
    without = train(vectors, 16, np.random.default_rng(0))
    assert (np.bincount(assign(vectors, without), minlength=16) > 0).sum() <= (sizes > 0).sum()


def test_an_empty_list_takes_half_of_a_large_one() -> None:
    sums = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    split = lists._split(sums.clone(), torch.tensor([3, 0, 1]))
    assert torch.equal(split[2], sums[2])
    assert torch.allclose(split[1] + split[0], 2 * sums[0], atol=1e-5)
    assert not torch.equal(split[1], split[0])


def test_as_many_lists_as_vectors_and_one_list_of_all() -> None:
    vectors = unit(20)
    assert train(vectors, 20, np.random.default_rng(0)).shape == (20, 16)
    center = train(vectors, 1, np.random.default_rng(0))
    mean = vectors.mean(axis=0)
    assert np.allclose(center[0], mean / np.linalg.norm(mean), atol=0.02)
    assert assign(vectors, center).tolist() == [0] * 20
