"""`AsyncClient`: every call of the service's API, as a coroutine.

What is given as `errors` (a dict) takes the errors of single items, by their places; without it the
first one is raised as ItemRefused. Every call raises ServiceError.

Legend: N items, E embedding.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import httpx
import numpy as np

from clipserve.client.answers import Hit, Prediction, read_vector
from clipserve.client.batches import Batches, Errors, Progress
from clipserve.client.pictures import Picture, encode_picture
from clipserve.client.transport import Transport, address
from clipserve.errors import RequestRefused

Item = Mapping[str, Any]
"""id, and image (as `embed_images` takes it), text or vector; caption, metadata"""
Priority = Literal["interactive", "bulk"]

_REQUEST_BYTES = 16 * 2**20
_JOB_LINES = 1000


class AsyncClient:
    """A client of one service. Close it after use, or use it in `async with`.

    timeout_s: of one request. retries: of a request that may be repeated. concurrency and
    batch_size: how many requests of one call are on their way, and the items in each.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 4,
        concurrency: int = 4,
        batch_size: int = 64,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._transport = Transport(
            url, api_key=api_key, timeout_s=timeout_s, retries=retries, transport=transport
        )
        self._call = self._transport.call
        self._batches = Batches(batch_size, _REQUEST_BYTES, concurrency)
        self._one_by_one = Batches(_JOB_LINES, _REQUEST_BYTES, 1)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection."""
        await self._transport.close()

    # Vectors and probabilities

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
        common = _given(modality="image", model=model, priority=priority)
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
        common = _given(modality="text", model=model, priority=priority)
        return await self._embed(texts, str, common, errors, progress)

    async def classify(
        self,
        images: Iterable[Picture],
        labels: Sequence[str] | None = None,
        *,
        label_set: str | None = None,
        templates: str | Sequence[str] = "none",
        top_k: int | None = None,
        temperature: float | None = None,
        multi_label: bool | None = None,
        min_probability: float | None = None,
        model: str | None = None,
        errors: Errors | None = None,
        progress: Progress | None = None,
    ) -> list[list[Prediction]]:
        """The labels of each picture, most probable first; none where `errors` tells why."""
        common = _given(
            labels=None if labels is None else list(labels),
            label_set=label_set,
            templates=templates if isinstance(templates, str) else list(templates),
            top_k=top_k,
            temperature=temperature,
            multi_label=multi_label,
            min_probability=min_probability,
            model=model,
        )

        async def send(encoded: Sequence[str]) -> list[Any]:
            answer = await self._call("POST", "/v1/classify", {"images": encoded, **common})
            return [_error(one) or _predictions(one) for one in answer["results"]]

        found = await self._batches.run(
            images, encode_picture, send, errors=errors, progress=progress
        )
        return [predictions or [] for predictions in found]

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
            body = {"images": shared or pictures, "texts": captions, **_given(model=model)}
            answer = await self._call("POST", "/v1/match", body)
            return [_error(one) or one["probability"] for one in answer["results"]]

        found = await self._batches.run(
            list(pairs),
            lambda pair: [encode(pair[0]), pair[1]],
            send,
            errors=errors,
            progress=progress,
        )
        return np.array([np.nan if one is None else one for one in found], dtype=np.float32)

    # Collections

    async def search(
        self,
        /,
        text: str | None = None,
        *,
        image: Picture | None = None,
        vector: Sequence[float] | np.ndarray | None = None,
        id: str | None = None,
        queries: Sequence[Mapping[str, Any]] | None = None,
        k: int = 10,
        collection: str | None = None,
        filter: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[Hit]:
        """The k nearest items of a collection, best first.

        By exactly one of text, image, vector, id (an item, more like which is looked for) and
        queries: parts, each {"text" or another of them: ..., "weight": ...}, that are looked for
        together. `options` are other fields of POST /v1/search: offset, min_score, field,
        deduplicate, rerank, k_test, with_vectors, exact.
        """
        parts = None if queries is None else [_encode_item(part) for part in queries]
        what = _encode_item(_given(text=text, image=image, vector=vector, id=id))
        how = _given(queries=parts, k=k, collection=collection, filter=filter, **options)
        answer = await self._call("POST", "/v1/search", what | how)
        return [Hit.read(hit) for hit in answer["hits"]]

    async def upsert(
        self,
        collection: str,
        items: Iterable[Item],
        *,
        errors: Errors | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Add or replace items; returns how many are stored, on disk. See `start_job` for many.

        An error that is raised leaves what was stored before it.
        """
        place = address("collections", collection, "items")

        async def send(encoded: Sequence[Any]) -> list[Any]:
            await self._call("PUT", place, {"items": encoded})
            return [True] * len(encoded)

        found = await self._batches.run(items, _encode_item, send, errors=errors, progress=progress)
        return sum(one is not None for one in found)

    async def delete(self, collection: str, ids: Iterable[str]) -> int:
        """Remove items; returns how many were there. Not repeated when the answer is lost."""
        place = address("collections", collection, "items:delete")

        async def send(encoded: Sequence[Any]) -> list[Any]:
            answer = await self._call("POST", place, {"ids": encoded}, idempotent=False)
            removed: int = answer["deleted"]
            return [removed] + [0] * (len(encoded) - 1)

        return sum(await self._batches.run(ids, str, send))

    async def collections(self) -> list[dict[str, Any]]:
        """Every collection served."""
        return await self._list("/v1/collections")

    async def collection(self, name: str) -> dict[str, Any]:
        """One collection: its size, its model, its index."""
        return await self._read("GET", address("collections", name))

    async def create_collection(self, name: str, *, model: str | None = None) -> dict[str, Any]:
        """A new, empty collection, of the vectors of one model. Not repeated when the answer is
        lost."""
        place = address("collections", name)
        return await self._read("PUT", place, _given(model=model), idempotent=False)

    async def drop_collection(self, name: str) -> None:
        """Delete a collection and all that is in it. Not repeated when the answer is lost."""
        await self._read("DELETE", address("collections", name), idempotent=False)

    # Jobs

    async def start_job(self, collection: str, items: Iterable[Item]) -> dict[str, Any]:
        """Store any number of items without waiting for it; `job` says how far it is.

        Items are given as to `upsert`. They are on the service's disk when this returns.
        """
        body = {"collection": collection, "start": False}
        job = await self._read("POST", "/v1/jobs", body, idempotent=False)
        try:
            await self._one_by_one.run(items, _encode_item, self._appender(job["id"]))
            return await self._read("POST", address("jobs", job["id"]) + ":start", idempotent=False)
        except BaseException:
            await self._read("DELETE", address("jobs", job["id"]))
            raise

    async def job(self, id: str) -> dict[str, Any]:
        """How far a job is: `state`, `done` of `total`, and which items `failed`."""
        return await self._read("GET", address("jobs", id))

    async def jobs(self) -> list[dict[str, Any]]:
        """Every job that is known."""
        return await self._list("/v1/jobs")

    async def cancel_job(self, id: str) -> dict[str, Any]:
        """Stop a job; what it stored stays."""
        return await self._read("DELETE", address("jobs", id), idempotent=False)

    # Models

    async def models(self) -> list[dict[str, Any]]:
        """Every model served, the default first."""
        return await self._list("/v1/models")

    async def reload(self, model: str, *, path: str | None = None) -> dict[str, Any]:
        """Take in a model's new checkpoint; which collections follow is in the answer."""
        place = address("models", model) + ":reload"
        return await self._read("POST", place, _given(path=path), idempotent=False)

    async def health(self) -> dict[str, Any]:
        """Raises ServiceOverloaded unless every model answers."""
        return await self._read("GET", "/health/ready")

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
                found[one["index"]] = _error(one)
            return found

        rows = await self._batches.run(items, encode, send, errors=errors, progress=progress)
        width = next((len(row) for row in rows if row is not None), 0)
        vectors = np.full((len(rows), width), np.nan, dtype=np.float32)
        for place, row in enumerate(rows):
            if row is not None:
                vectors[place] = row
        return vectors

    async def _list(self, place: str) -> list[dict[str, Any]]:
        data: list[dict[str, Any]] = (await self._call("GET", place))["data"]
        return data

    async def _read(
        self, method: str, place: str, body: Any = None, *, idempotent: bool = True
    ) -> dict[str, Any]:
        answer: dict[str, Any] = await self._call(method, place, body, idempotent=idempotent)
        return answer

    def _appender(self, job: str) -> Callable[[Sequence[Any]], Awaitable[Sequence[Any]]]:
        place = address("jobs", job) + ":append"

        async def send(encoded: Sequence[Any]) -> list[Any]:
            await self._call("POST", place, lines=encoded, idempotent=False)
            return [True] * len(encoded)

        return send


def _given(**values: Any) -> dict[str, Any]:
    """What the caller gave; the rest is the service's default."""
    return {name: value for name, value in values.items() if value is not None}


def _encode_item(item: Item) -> dict[str, Any]:
    """An item or a part of a query, as JSON."""
    encoded = dict(item)
    if encoded.get("image") is not None:
        encoded["image"] = encode_picture(encoded["image"])
    if isinstance(encoded.get("vector"), np.ndarray):
        encoded["vector"] = encoded["vector"].tolist()
    return encoded


def _error(answer: Mapping[str, Any]) -> RequestRefused | None:
    """The error in the place of an item's answer, if there is one."""
    if "error" not in answer:
        return None
    fields = answer["error"]
    return RequestRefused(fields["message"], code=fields["code"], param=fields["param"])


def _predictions(answer: Mapping[str, Any]) -> list[Prediction]:
    return [Prediction(one["label"], one["probability"]) for one in answer["predictions"]]
