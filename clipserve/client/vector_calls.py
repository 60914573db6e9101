"""Vectors and probabilities: embedding, classification, matching, ordering.

Legend: N items, E embedding.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import numpy as np

from clipserve.client.answers import Prediction, Ranked, read_vector
from clipserve.client.batches import Errors, Progress
from clipserve.client.calls import (
    Answer,
    Calls,
    Truncated,
    cut_places,
    encode_query,
    error_of,
    given,
    tell_cut,
)
from clipserve.client.pictures import Picture, encode_picture
from clipserve.errors import RequestRefused

Priority = Literal["interactive", "bulk"]
Passage = str | Mapping[str, Any]
"""a text, {"text": ...} or {"image": ...} (as `embed_images` takes it)"""


class Judging(TypedDict, total=False):
    """How items are classified, as in docs/api.md; all of it may be left out."""

    label_set: str
    """a stored list of labels, in the place of `labels`"""
    templates: str | Sequence[str]
    """the name of a template set, or templates with {}"""
    top_k: int
    temperature: float
    multi_label: bool
    min_probability: float
    model: str


class VectorCalls(Calls):
    """What a model says of pictures and texts."""

    async def embed_images(
        self,
        images: Iterable[Picture],
        *,
        model: str | None = None,
        priority: Priority = "interactive",
        errors: Errors | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """(N, E) float32 unit vectors; NaN where `errors` tells why."""
        common = given(modality="image", model=model, priority=priority)
        vectors, _ = await self._embed(images, encode_picture, common, errors, progress)
        return vectors

    async def embed_texts(
        self,
        texts: Iterable[str],
        *,
        model: str | None = None,
        priority: Priority = "interactive",
        truncate: bool = True,
        truncated: Truncated | None = None,
        errors: Errors | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """(N, E) float32 unit vectors; NaN where `errors` tells why.

        truncate: False refuses a text that does not fit into the model's context.
        """
        common = given(modality="text", model=model, priority=priority, truncate=truncate)
        vectors, cut = await self._embed(texts, str, common, errors, progress)
        tell_cut(cut, truncated)
        return vectors

    async def classify(
        self,
        images: Iterable[Picture],
        labels: Sequence[str] | None = None,
        *,
        errors: Errors | None = None,
        progress: Progress | None = None,
        **how: Unpack[Judging],
    ) -> list[list[Prediction]]:
        """The labels of each picture, most probable first; none where `errors` tells why."""
        common = _judging(labels, how)
        found = await self._classify("images", images, encode_picture, common, errors, progress)
        tell_cut(found.cut_labels)
        return found.predictions

    async def classify_texts(
        self,
        texts: Iterable[str],
        labels: Sequence[str] | None = None,
        *,
        truncated: Truncated | None = None,
        errors: Errors | None = None,
        progress: Progress | None = None,
        **how: Unpack[Judging],
    ) -> list[list[Prediction]]:
        """The labels of each text, most probable first; none where `errors` tells why."""
        common = _judging(labels, how)
        found = await self._classify("texts", texts, str, common, errors, progress)
        tell_cut(found.cut, truncated)
        tell_cut(found.cut_labels)
        return found.predictions

    async def match(
        self,
        images: Sequence[Picture],
        texts: Sequence[str],
        *,
        model: str | None = None,
        truncated: Truncated | None = None,
        errors: Errors | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """(N,) probabilities that picture i and text i belong together (ALBEF).

        One picture goes with each of several texts, one text with each of several pictures.
        """
        count = max(len(images), len(texts))
        if not {len(images), len(texts)} <= {1, count}:
            raise RequestRefused(f"{len(images)} images and {len(texts)} texts make no pairs")
        # One picture is encoded once, and sent once in each request.
        shared = [encode_picture(images[0])] if len(images) == 1 else None
        encode = encode_picture if shared is None else str
        pairs = zip(
            images if shared is None else shared * count,
            texts if len(texts) == count else list(texts) * count,
            strict=True,
        )

        async def send(encoded: Sequence[Any]) -> list[Any]:
            pictures, captions = zip(*encoded, strict=True)
            body = {"images": shared or pictures, "texts": captions, **given(model=model)}
            answer = await self._call("POST", "/v1/match", body)
            return [error_of(one) or _answer(one, one["probability"]) for one in answer["results"]]

        found = await self._batches.run(
            list(pairs),
            lambda pair: [encode(pair[0]), pair[1]],
            send,
            errors=errors,
            progress=progress,
        )
        tell_cut(cut_places(found), truncated)
        return np.array([np.nan if one is None else one.value for one in found], dtype=np.float32)

    async def rerank(
        self,
        query: Passage,
        documents: Iterable[Passage],
        *,
        top_n: int | None = None,
        model: str | None = None,
    ) -> list[Ranked]:
        """The documents by how they fit the query, best first; as many as one request may hold."""
        encoded = [encode_query(document) for document in documents]
        body = {"query": encode_query(query), "documents": encoded, **given(top_n=top_n)}
        answer = await self._call("POST", "/v1/rerank", body | given(model=model))
        tell_cut(answer["truncated"])
        return [Ranked(one["index"], one["relevance_score"]) for one in answer["results"]]

    async def _embed(
        self,
        items: Iterable[Any],
        encode: Callable[[Any], str],
        common: dict[str, Any],
        errors: Errors | None,
        progress: Progress | None,
    ) -> tuple[np.ndarray, list[int]]:
        """Vectors, and the places of texts that were cut."""

        async def send(encoded: Sequence[str]) -> list[Any]:
            body = {"input": encoded, "encoding_format": "base64", "on_error": "report", **common}
            answer = await self._call("POST", "/v1/embeddings", body)
            found: list[Any] = [None] * len(encoded)
            for one in answer["data"]:
                found[one["index"]] = _answer(one, read_vector(one["embedding"]))
            for one in answer["errors"]:
                found[one["index"]] = error_of(one)
            return found

        rows = await self._batches.run(items, encode, send, errors=errors, progress=progress)
        width = next((len(row.value) for row in rows if row is not None), 0)
        vectors = np.full((len(rows), width), np.nan, dtype=np.float32)
        for place, row in enumerate(rows):
            if row is not None:
                vectors[place] = row.value
        return vectors, cut_places(rows)

    async def _classify(
        self,
        kind: Literal["images", "texts"],
        items: Iterable[Any],
        encode: Callable[[Any], str],
        common: dict[str, Any],
        errors: Errors | None,
        progress: Progress | None,
    ) -> "_Classified":
        cut_labels: list[str] = []

        async def send(encoded: Sequence[str]) -> list[Any]:
            answer = await self._call("POST", "/v1/classify", {kind: encoded, **common})
            cut_labels[:] = [f"label {place}" for place in answer["truncated_labels"]]
            return [error_of(one) or _answer(one, _predictions(one)) for one in answer["results"]]

        found = await self._batches.run(items, encode, send, errors=errors, progress=progress)
        predictions = [[] if one is None else one.value for one in found]
        return _Classified(predictions, cut_places(found), cut_labels)


class _Classified(NamedTuple):
    predictions: list[list[Prediction]]
    cut: list[int]
    cut_labels: list[str]
    """of every request the same"""


def _judging(labels: Sequence[str] | None, how: Judging) -> dict[str, Any]:
    common = given(labels=None if labels is None else list(labels), **how)
    if not isinstance(common.get("templates", ""), str):
        common["templates"] = list(common["templates"])
    return common


def _predictions(answer: dict[str, Any]) -> list[Prediction]:
    return [Prediction(one["label"], one["probability"]) for one in answer["predictions"]]


def _answer(answer: dict[str, Any], value: Any) -> Answer:
    return Answer(value, answer.get("truncated", False))  # which a picture has not
