import faiss
import numpy as np

from index.backends.faiss_cpu import FaissBackend
from index.backends.inverted import InvertedLists

DIM = 8


def unit(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def filled(kind: str, vectors: np.ndarray) -> faiss.Index:
    index = faiss.index_factory(DIM, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(unit(700))
    index.add(vectors)
    return index


def test_a_mask_is_counted_list_by_list() -> None:
    vectors = unit(300)
    index = filled("IVF16,SQ8", vectors)
    lists, mask = InvertedLists(index), np.random.default_rng(1).random(300) < 0.3
    own = index.quantizer.search(vectors, 1)[1][:, 0]
    assert lists.sizes.tolist() == np.bincount(own, minlength=16).tolist()
    assert lists.count(mask).tolist() == np.bincount(own[mask], minlength=16).tolist()


def test_lists_without_rows_have_none() -> None:
    vectors = np.repeat(unit(1), 5, axis=0)
    lists = InvertedLists(filled("IVF16,Flat", vectors))
    assert sorted(lists.count(np.arange(5) < 2).tolist()) == [0] * 15 + [2]
    assert InvertedLists(filled("IVF16,Flat", vectors[:0])).count(np.zeros(0, bool)).sum() == 0


def test_the_nearest_lists_are_those_that_a_search_looks_into() -> None:
    vectors, queries = unit(300), unit(9, seed=1)
    index = filled("IVF16,Flat", vectors)
    lists = InvertedLists(index)
    own = index.quantizer.search(vectors, 1)[1][:, 0]
    _, found = FaissBackend(index).search(queries, 300, 3)
    for labels, near in zip(found, lists.nearest(queries, 3), strict=True):
        assert set(own[labels[labels >= 0]].tolist()) == set(near.tolist())
    assert lists.nearest(queries, 99).shape == (9, 16)


def test_only_an_index_with_lists_has_them() -> None:
    assert FaissBackend(filled("IVF16,Flat", unit(300))).lists is not None
    assert FaissBackend(filled("HNSW8,Flat", unit(300))).lists is None
