import numpy as np
import pytest

from index import distinct as distinct_module
from index.backends.scan import ScanBackend
from index.distinct import Similar, distinct
from index.view import NO_ROWS, Selection, View

DIM = 8
COUNT = 400


def unit(count: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def ids_of(rowids: np.ndarray) -> dict[int, str]:
    return {rowid: f"{rowid}" for rowid in rowids.tolist()}


def view_of(vectors: np.ndarray) -> View:
    fresh = ScanBackend(DIM).append(np.arange(len(vectors)), vectors)
    return View(1, "image", len(vectors), None, NO_ROWS, fresh)


def test_no_rows_are_no_answer() -> None:
    nothing, similar = Selection(NO_ROWS, None, 0), Similar(0.9, np.zeros(0, np.int64), -1)
    query = unit(1).astype(np.float64)
    ((rowids, scores),) = distinct(view_of(unit(COUNT)), nothing, query, 5, similar, ids_of)
    assert (len(rowids), len(scores)) == (0, 0)


def test_who_is_similar_to_all_others_is_not_looked_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vectors = np.repeat(unit(2), [COUNT - 1, 1], axis=0)
    query = vectors[:1].astype(np.float64)
    view = view_of(vectors)
    similar = Similar(0.9, np.zeros(0, np.int64), -1)
    for most, expected in ((100, 1), (COUNT, 2)):
        monkeypatch.setattr(distinct_module, "_LOOKED_AT", most)
        ((rowids, _),) = distinct(view, Selection(NO_ROWS, None, COUNT), query, 2, similar, ids_of)
        assert len(rowids) == expected
