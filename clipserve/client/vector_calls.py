"""Vectors and probabilities: embedding, classification, matching.

Legend: N items, E embedding.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypedDict, Unpack

import numpy as np

from clipserve.client.answers import Prediction, read_vector
from clipserve.client.batches import Errors, Progress
from clipserve.client.calls import Calls, error_of, given
from clipserve.client.pictures import Picture, encode_picture
from clipserve.errors import RequestRefused

Priority = Literal["interactive", "bulk"]


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
        return await self._embed(images, encode_picture, common, errors, progress)

    async def embed_texts(
        self,
        texts: Iterable[str],
        *,
        model: str | None = None,
        priority: Priority = "interactive",
        errors: Errors | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """(N, E) float32 unit vectors; NaN where `errors` tells why."""
        common = given(modality="text", model=model, priority=priority)
        return await self._embed(texts, str, common, errors, progress)

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
        return await self._classify("images", images, encode_picture, common, errors, progress)

    async def classify_texts(
        self,
        texts: Iterable[str],
        labels: Sequence[str] | None = None,
        *,
        errors: Errors | None = None,
        progress: Progress | None = None,
        **how: Unpack[Judging],
    ) -> list[list[Prediction]]:
        """The labels of each text, most probable first; none where `errors` tells why."""
        common = _judging(labels, how)
        return await self._classify("texts", texts, str, common, errors, progress)

    async def match(
        self,
        images: Sequence[Picture],
        texts: Sequence[str],
        *,
        model: str | None = None,
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
            return [error_of(one) or one["probability"] for one in answer["results"]]

        found = await self._batches.run(
            list(pairs),
            lambda pair: [encode(pair[0]), pair[1]],
            send,
            errors=errors,
            progress=progress,
        )
        return np.array([np.nan if one is None else one for one in found], dtype=np.float32)

    async def _embed(
        self,
        items: Iterable[Any],
        encode: Callable[[Any], str],
        common: dict[str, Any],
        errors: Errors | None,
        progress: Progress | None,
    ) -> np.ndarray:
        async def send(encoded: Sequence[str]) -> list[Any]:
            body = {"input": encoded, "encoding_format": "base64", "on_error": "report", **common}
            answer = await self._call("POST", "/v1/embeddings", body)
            found: list[Any] = [None] * len(encoded)
            for one in answer["data"]:
                found[one["index"]] = read_vector(one["embedding"])
            for one in answer["errors"]:
                found[one["index"]] = error_of(one)
            return found

        rows = await self._batches.run(items, encode, send, errors=errors, progress=progress)
        width = next((len(row) for row in rows if row is not None), 0)
        vectors = np.full((len(rows), width), np.nan, dtype=np.float32)
        for place, row in enumerate(rows):
            if row is not None:
                vectors[place] = row
        return vectors

    async def _classify(
        self,
        kind: Literal["images", "texts"],
        items: Iterable[Any],
        encode: Callable[[Any], str],
        common: dict[str, Any],
        errors: Errors | None,
        progress: Progress | None,
    ) -> list[list[Prediction]]:
        async def send(encoded: Sequence[str]) -> list[Any]:
            answer = await self._call("POST", "/v1/classify", {kind: encoded, **common})
            return [error_of(one) or _predictions(one) for one in answer["results"]]

        found = await self._batches.run(items, encode, send, errors=errors, progress=progress)
        return [predictions or [] for predictions in found]


def _judging(labels: Sequence[str] | None, how: Judging) -> dict[str, Any]:
    common = given(labels=None if labels is None else list(labels), **how)
    if not isinstance(common.get("templates", ""), str):
        common["templates"] = list(common["templates"])
    return common


def _predictions(answer: dict[str, Any]) -> list[Prediction]:
    return [Prediction(one["label"], one["probability"]) for one in answer["predictions"]]
