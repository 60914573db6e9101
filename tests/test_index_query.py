from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import make_picture

from clipserve.errors import ConfigError, IndexStoreError
from clipserve.images import ImageSource
from clipserve.model import ModelInfo
from index.collection import Collection
from index.items import Item
from index.query import MAX_PARTS, Query, answer, resolve
from index.search import Searcher

DIM = 8
WORDS = np.eye(DIM, dtype=np.float32)


class Encoder:
    """The text "3" is axis 3, a picture of width w axis w; counts its calls."""

    def __init__(self, fingerprint: str | None = "a" * 64) -> None:
        self.info = ModelInfo(fingerprint=fingerprint)
        self.calls: list[list[object]] = []

    def embed_texts(self, texts: Iterable[str]) -> np.ndarray:
        self.calls.append(list(texts))
        return WORDS[[int(text) for text in self.calls[-1]]]

    def embed_images(self, sources: Iterable[ImageSource]) -> np.ndarray:
        self.calls.append(list(sources))
        return WORDS[[source.size[0] for source in self.calls[-1]]]


@pytest.fixture
def collection(tmp_path: Path) -> Iterator[Collection]:
    """Item "i" lies along axis i; the text vectors of "text" alone, along axis 7."""
    path = tmp_path / "pets"
    with Collection.create(path, fingerprint="a" * 64, model_name="t", embed_dim=DIM) as made:
        made.upsert([Item(f"{i}") for i in range(6)], WORDS[:6])
        made.upsert([Item("text")], None, text_vectors=WORDS[7:])
        yield made


def unit(*numbers: float) -> np.ndarray:
    vector = np.zeros(DIM)
    vector[: len(numbers)] = numbers
    return vector / np.linalg.norm(vector)


def test_a_query_is_the_weighted_sum_of_its_parts_at_unit_length(collection: Collection) -> None:
    query = Query(
        texts=[("0", 2), ("1", -1)],
        images=[(make_picture(width=2), 0.5)],
        ids=[("3", 3)],
        vectors=[(5 * WORDS[4], 1)],
    )
    found = resolve(Encoder(), collection, [query, Query(texts=[("5", 7)])])
    assert found.dtype == np.float32
    assert np.allclose(found, [unit(2, -1, 0.5, 3, 1), WORDS[5]], atol=1e-7)


@pytest.mark.parametrize(
    ("fingerprint", "says"),
    [("b" * 64, f"{'a' * 12}, not by .*{'b' * 12}"), (None, "no fingerprint yet; save it")],
)
def test_another_model_of_the_same_dimension_is_refused_naming_both(
    collection: Collection, fingerprint: str | None, says: str
) -> None:
    other = Encoder(fingerprint)
    for query in (Query(texts=[("0", 1)]), Query(images=[(make_picture(width=2), 1)])):
        with pytest.raises(IndexStoreError, match=says):
            resolve(other, collection, [query])
    assert other.calls == []
    resolve(other, collection, [Query(ids=[("3", 1)])])  # asks no model


def test_all_texts_are_embedded_in_one_call_and_each_once(collection: Collection) -> None:
    encoder = Encoder()
    pictures = [make_picture(width=i) for i in (1, 2)]
    queries = [Query(texts=[("0", 1), ("1", 1)], images=[(one, 1)]) for one in pictures]
    found = resolve(encoder, collection, queries)
    assert encoder.calls == [["0", "1"], pictures]
    assert np.allclose(found, [unit(1, 2), unit(1, 1, 1)], atol=1e-7)


def test_ids_and_vectors_need_no_model_and_texts_do(collection: Collection) -> None:
    assert np.allclose(resolve(None, collection, [Query(ids=[("3", 1)])]), WORDS[3:4])
    with pytest.raises(ConfigError, match="needs the collection's model"):
        resolve(None, collection, [Query(texts=[("3", 1)])])


def test_an_id_stands_for_its_vector_in_the_field_that_is_searched(collection: Collection) -> None:
    found = resolve(None, collection, [Query(ids=[("text", 1)])], "text")
    assert np.allclose(found, WORDS[7:])
    with pytest.raises(IndexStoreError, match="'text' has no image vector"):
        resolve(None, collection, [Query(ids=[("text", 1)])], "image")


def test_an_unknown_id_is_named(collection: Collection) -> None:
    with pytest.raises(IndexStoreError, match="'pets' has no item 'lost'"):
        resolve(None, collection, [Query(ids=[("1", 1), ("lost", 1)])])


@pytest.mark.parametrize(
    "parts", [[("0", 1.0), ("0", -1.0)], [("0", 1), ("1", 1), ("0", -1), ("1", -1.00001)]]
)
def test_parts_that_cancel_each_other_are_an_error(
    collection: Collection, parts: list[tuple[str, float]]
) -> None:
    fine = Query(texts=[("1", 1)])
    with pytest.raises(IndexStoreError, match="parts of query 1 cancel each other"):
        resolve(Encoder(), collection, [fine, Query(texts=parts)])


@pytest.mark.parametrize("weight", [0.0, np.nan, np.inf])
def test_a_weight_is_a_finite_number_but_zero(weight: float) -> None:
    with pytest.raises(IndexStoreError, match="weight .* of a query is not allowed"):
        Query(texts=[("a", weight)])


def test_a_query_has_parts_but_not_too_many() -> None:
    with pytest.raises(IndexStoreError, match="a query of 0 parts"):
        Query()
    with pytest.raises(IndexStoreError, match=f"a query of {MAX_PARTS + 1} parts"):
        Query(texts=[("a", 1)] * MAX_PARTS, ids=[("b", 1)])


@pytest.mark.parametrize(
    ("vector", "says"),
    [
        (np.zeros(DIM), "zero or not finite"),
        (np.full(DIM, np.nan), "zero or not finite"),
        (np.ones(DIM + 1), r"shape \(9,\), not \(8,\)"),
        (np.ones((1, DIM)), r"shape \(1, 8\)"),
    ],
)
def test_a_vector_without_a_direction_is_refused(
    collection: Collection, vector: np.ndarray, says: str
) -> None:
    with pytest.raises(IndexStoreError, match=says):
        resolve(None, collection, [Query(vectors=[(vector, 1)])])


def test_a_model_of_another_dimension_is_refused(collection: Collection) -> None:
    class Wide(Encoder):
        def embed_texts(self, texts: Iterable[str]) -> np.ndarray:
            return np.ones((1, DIM + 1), np.float32)

    with pytest.raises(IndexStoreError, match="vectors have 9 numbers, those of .* 8"):
        resolve(Wide(), collection, [Query(texts=[("0", 1)])])


def test_no_queries_are_no_vectors(collection: Collection) -> None:
    assert resolve(None, collection, []).shape == (0, DIM)


def test_more_like_this_leaves_the_item_itself_out(collection: Collection) -> None:
    queries = [
        Query(ids=[("3", 1)], texts=[("1", 0.5)]),
        Query(texts=[("3", 1), ("2", 0.5)]),
        Query(ids=[("3", 1), ("1", 1)], texts=[("0", 0.5)]),
    ]
    assert queries[2].exclude == ("3", "1")
    with Searcher(collection.path, device="cpu") as searcher:
        hits = answer(searcher, Encoder(), queries, 2)
        assert [[hit.id for hit in own] for own in hits] == [["1", "0"], ["3", "2"], ["0", "2"]]
        hits = answer(searcher, Encoder(), queries, 2, exclude=["2"], offset=1)
        assert [[hit.id for hit in own] for own in hits] == [["0", "4"], ["0", "1"], ["4", "5"]]
        assert answer(searcher, None, [], 2) == []
