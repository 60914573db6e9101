"""Collections: making and dropping them, what is in them, and searching it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

import numpy as np

from clipserve.client.answers import Hit
from clipserve.client.batches import Errors, Progress
from clipserve.client.calls import (
    Answer,
    Calls,
    Item,
    Truncated,
    cut_places,
    encode_item,
    encode_query,
    given,
    tell_cut,
)
from clipserve.client.pictures import Picture
from clipserve.client.transport import address
from clipserve.errors import NotThere, RequestRefused

Query = str | Mapping[str, Any]
"""a text, or one of text, image (as `embed_images` takes it), vector, id and queries"""


class CollectionCalls(Calls):
    """What is stored, and finding it again."""

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
        what = given(text=text, image=image, vector=vector, id=id, queries=queries)
        how = given(k=k, collection=collection, filter=filter, **options)
        answer = await self._call("POST", "/v1/search", encode_item(what) | how)
        tell_cut(["the query"] if answer["query"]["truncated"] else [])
        return [Hit.read(hit) for hit in answer["hits"]]

    async def search_many(
        self,
        /,
        queries: Iterable[Query],
        *,
        k: int = 10,
        collection: str | None = None,
        filter: Mapping[str, Any] | None = None,
        truncated: Truncated | None = None,
        errors: Errors | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> list[list[Hit]]:
        """The hits of each of many queries, which `search` would find one by one; none where
        `errors` tells why."""
        how = given(k=k, collection=collection, filter=filter, **options)

        async def send(encoded: Sequence[Any]) -> list[Any]:
            answer = await self._call("POST", "/v1/search", {"batch": encoded, **how})
            return [
                Answer([Hit.read(hit) for hit in one["hits"]], one["query"]["truncated"])
                for one in answer["results"]
            ]

        found = await self._batches.run(
            queries, encode_query, send, errors=errors, progress=progress
        )
        tell_cut(cut_places(found), truncated)
        return [[] if one is None else one.value for one in found]

    async def upsert(
        self,
        collection: str,
        items: Iterable[Item],
        *,
        truncated: Truncated | None = None,
        errors: Errors | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Add or replace items; returns how many are stored, on disk. See `start_job` for many.

        An error that is raised leaves what was stored before it.
        """
        place = address("collections", collection, "items")

        async def send(encoded: Sequence[Any]) -> list[Any]:
            answer = await self._call("PUT", place, {"items": encoded})
            cut = set(answer["truncated"])
            return [Answer(True, row in cut) for row in range(len(encoded))]

        found = await self._batches.run(items, encode_item, send, errors=errors, progress=progress)
        tell_cut(cut_places(found), truncated)
        return sum(one is not None for one in found)

    async def delete(self, collection: str, ids: Iterable[str]) -> int:
        """Remove items; returns how many were there. Not repeated when the answer is lost."""
        place = address("collections", collection, "items:delete")

        async def send(encoded: Sequence[Any]) -> list[Any]:
            answer = await self._call("POST", place, {"ids": encoded}, idempotent=False)
            removed: int = answer["deleted"]
            return [removed] + [0] * (len(encoded) - 1)

        return sum(await self._batches.run(ids, str, send))

    async def item(self, collection: str, id: str) -> dict[str, Any]:
        """One item: its caption, metadata, and where its picture is."""
        return await self._read("GET", address("collections", collection, "items", id))

    async def items(
        self, collection: str, *, start_after: str = "", limit: int = 100
    ) -> list[dict[str, Any]]:
        """A page of items by their ids; the last id of it is `start_after` of the next."""
        query = urlencode({"start_after": start_after, "limit": limit})
        return await self._list(f"{address('collections', collection, 'items')}?{query}")

    async def item_image(self, collection: str, id: str) -> bytes:
        """The small JPEG that was kept of an item's picture; NotThere where there is none."""
        place = address("collections", collection, "items", id, "image")
        jpeg: bytes = await self._call("GET", place, as_bytes=True)
        return jpeg

    async def collections(self) -> list[dict[str, Any]]:
        """Every collection served."""
        return await self._list("/v1/collections")

    async def collection(self, name: str) -> dict[str, Any]:
        """One collection: its size, its model, its index."""
        return await self._read("GET", address("collections", name))

    async def count(self, collection: str, *, filter: Mapping[str, Any] | None = None) -> int:
        """How many items there are, or how many a filter holds for."""
        query = "" if filter is None else "?" + urlencode({"filter": json.dumps(filter)})
        answer = await self._read("GET", address("collections", collection, "count") + query)
        count: int = answer["count"]
        return count

    async def rebuild(self, collection: str) -> None:
        """Build the index anew, in the background; `collection` says `rebuilding` until then."""
        await self._read("POST", address("collections", collection) + ":rebuild")

    async def create_collection(
        self, name: str, *, model: str | None = None, exist_ok: bool = False
    ) -> dict[str, Any]:
        """A new, empty collection, of the vectors of one model.

        exist_ok: one that is there already will do, unless it is another model's. Without it the
        request is not repeated when the answer is lost.
        """
        place = address("collections", name)
        try:
            return await self._read("PUT", place, given(model=model), idempotent=exist_ok)
        except RequestRefused as error:
            if not exist_ok or error.code != "collection_exists":
                raise
        found = await self.collection(name)
        if model is not None and found["model"] != model:
            raise RequestRefused(
                f"the collection {name} is of the model {found['model']}, not of {model};"
                " take another name, or drop it",
                code="collection_exists",
                param="model",
            )
        return found

    async def drop_collection(self, name: str, *, missing_ok: bool = False) -> None:
        """Delete a collection and all that is in it.

        missing_ok: no error if there is none. Without it the request is not repeated when the
        answer is lost.
        """
        try:
            await self._read("DELETE", address("collections", name), idempotent=missing_ok)
        except NotThere:
            if not missing_ok:
                raise
