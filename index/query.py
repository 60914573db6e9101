"""What is looked for: texts, pictures, items and vectors, weighted and summed to one unit vector.

"This, but red" is `Query(ids=[("shoe-17", 1)], texts=[("red", 0.5)])`; a negative weight looks
away from something. Start at `answer` for queries to hits, at `resolve` for queries to vectors.

Legend: Q queries, E embedding.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from clipserve.errors import ConfigError, IndexStoreError
from clipserve.images import ImageSource
from index.collection import Collection
from index.search import Hit, Searcher

if TYPE_CHECKING:
    from clipserve.model import ModelInfo

MAX_PARTS = 64
"""texts, pictures, items and vectors of one query"""

_LEAST_LENGTH = 1e-4
"""of the sum beside the weights' own; below it what is left is rounding, and bf16's at that"""


class Encoder(Protocol):
    """What a `clipserve.model.Model` does for a query."""

    @property
    def info(self) -> "ModelInfo":
        """Whose fingerprint has to be the collection's."""

    def embed_texts(self, texts: Iterable[str]) -> np.ndarray:
        """(N, E) float32 unit vectors."""

    def embed_images(self, sources: Iterable[ImageSource]) -> np.ndarray:
        """(N, E) float32 unit vectors."""


@dataclass(frozen=True)
class Query:
    """Parts with their weights; IndexStoreError if there is none, or a weight is 0 or infinite."""

    texts: Sequence[tuple[str, float]] = ()
    images: Sequence[tuple[ImageSource, float]] = ()
    ids: Sequence[tuple[str, float]] = ()
    """items of the collection; each stands for its stored vector, and is not its own answer"""
    vectors: Sequence[tuple[np.ndarray, float]] = ()
    """(E,) each, of any length but zero"""

    def __post_init__(self) -> None:
        weights = [weight for _, weight in self._parts()]
        if not 1 <= len(weights) <= MAX_PARTS:
            raise IndexStoreError(
                f"a query of {len(weights)} parts is not allowed; give 1 to {MAX_PARTS} texts,"
                " pictures, ids and vectors"
            )
        for weight in weights:
            if not math.isfinite(weight) or weight == 0:
                raise IndexStoreError(
                    f"weight {weight:g} of a query is not allowed; give a finite number but 0"
                )

    @property
    def exclude(self) -> tuple[str, ...]:
        """The ids to leave out of the answer: those that were asked with."""
        return tuple(dict.fromkeys(id for id, _ in self.ids))

    def _parts(self) -> list[tuple[object, float]]:
        return [*self.texts, *self.images, *self.ids, *self.vectors]


def answer(
    searcher: Searcher, model: Encoder | None, queries: Sequence[Query], k: int = 10, **how: Any
) -> list[list[Hit]]:
    """The hits of each query; `how` is handed to `Searcher.search`, `exclude` for all of them.

    Queries that leave the same items out are searched for together. Raises as `resolve` and
    `Searcher.search` do.
    """
    vectors = resolve(model, searcher.collection, queries, searcher.field)
    everywhere = tuple(how.pop("exclude", ()))
    together: dict[tuple[str, ...], list[int]] = {}
    for place, query in enumerate(queries):
        together.setdefault(query.exclude, []).append(place)
    hits: list[list[Hit]] = [[] for _ in queries]
    for exclude, places in together.items():
        found = searcher.search(vectors[places], k, exclude=(*exclude, *everywhere), **how)
        for place, own in zip(places, found, strict=True):
            hits[place] = own
    return hits


def resolve(
    model: Encoder | None, collection: Collection, queries: Sequence[Query], field: str = "image"
) -> np.ndarray:
    """(Q, E) float32 unit vectors: each query's weighted sum of unit vectors, to length 1.

    All texts are embedded together, and all pictures. `model` may be None if there are neither;
    an id stands for its item's vector in `field`. ConfigError without a model that is needed.
    IndexStoreError for a model that did not make the collection, an unknown id, a vector without
    direction, or a sum that has none left; ImageError for a bad picture.
    """
    embedders: dict[str, Callable[[list[Any]], np.ndarray]] = {
        "texts": lambda texts: _embed_texts(_needed(model, collection), texts),
        "images": lambda images: _needed(model, collection).embed_images(images),
        "ids": lambda ids: _stored(collection, ids, field),
        "vectors": lambda vectors: _given(vectors, collection.embed_dim),
    }
    sums = np.zeros((len(queries), collection.embed_dim))
    weights = np.zeros(len(queries))
    for kind, embed in embedders.items():
        parts = [(row, *part) for row, query in enumerate(queries) for part in getattr(query, kind)]
        if parts:
            vectors = embed([value for _, value, _ in parts]).astype(np.float64)
            _check_dimension(vectors, collection)
            rows, _, factors = zip(*parts, strict=True)
            np.add.at(sums, list(rows), np.array(factors)[:, None] * vectors)
            np.add.at(weights, list(rows), np.abs(factors))
    lengths = np.linalg.norm(sums, axis=1)
    cancelled = np.flatnonzero(lengths <= _LEAST_LENGTH * weights)
    if len(cancelled):
        raise IndexStoreError(
            f"the parts of query {cancelled[0]} cancel each other, its sum has length"
            f" {lengths[cancelled[0]]:.2g}; change a weight, or leave a part out"
        )
    return np.asarray(sums / lengths[:, None], dtype=np.float32)


def _needed(model: Encoder | None, collection: Collection) -> Encoder:
    if model is None:
        raise ConfigError("a query by text or picture needs the collection's model; give it")
    if model.info.fingerprint is None:
        raise IndexStoreError("the model has no fingerprint yet; save it and load it from there")
    collection.check_model(model.info.fingerprint)
    return model


def _embed_texts(model: Encoder, texts: list[str]) -> np.ndarray:
    """Each text once, however many queries share it."""
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    return model.embed_texts(list(places))[[places[text] for text in texts]]


def _stored(collection: Collection, ids: list[str], field: str) -> np.ndarray:
    """The vectors (N, E) that items have in `field`."""
    with collection.snapshot():
        rowids = collection.rowids_of(ids)
        for id in ids:
            if id not in rowids:
                raise IndexStoreError(
                    f"collection {collection.name!r} has no item {id!r} to search with; use an id"
                    " that is there"
                )
        wanted = np.array([rowids[id] for id in ids])
        try:
            return collection.vectors_of(wanted, field)
        except IndexStoreError:
            missing = np.flatnonzero(~np.isin(wanted, collection.rowids(field)))
            if not len(missing):
                raise
            raise IndexStoreError(
                f"item {ids[missing[0]]!r} has no {field} vector to search with; use another item"
            ) from None


def _given(vectors: list[np.ndarray], embed_dim: int) -> np.ndarray:
    """Vectors as they came in, at length 1."""
    found = [np.asarray(vector, dtype=np.float64) for vector in vectors]
    for vector in found:
        if vector.shape != (embed_dim,):
            raise IndexStoreError(f"a query vector has shape {vector.shape}, not ({embed_dim},)")
    matrix = np.stack(found)
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise IndexStoreError("a query vector is zero or not finite; it has no direction")
    return np.asarray(matrix / lengths)


def _check_dimension(vectors: np.ndarray, collection: Collection) -> None:
    if vectors.shape[1] != collection.embed_dim:
        raise IndexStoreError(
            f"the model's vectors have {vectors.shape[1]} numbers, those of collection"
            f" {collection.name!r} {collection.embed_dim}; use the model that made it"
        )
