"""/v1/collections: what is in them, item by item, and changing that.

An id is any text. In a path it is percent-encoded, "/" too (%2F), which is why ids are read from
the path as it was sent: of the decoded one, `a/image` could be an item or the picture of `a`.
"""

import hashlib
from typing import Annotated, Any
from urllib.parse import unquote

import numpy as np
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from clipserve.errors import IndexStoreError
from index.cache import read_info
from index.collection import Item, check_item
from service.errors import NotFound, RequestError, at
from service.inputs import Input, check_count, parse_picture, parse_text, parse_vector
from service.registry import ServedCollection
from service.replies import image_url, reply
from service.routes.state import ServedRegistry
from service.schemas import UpsertItem, UpsertRequest, read_json, request_docs

router = APIRouter(tags=["collections"])

_FOREVER = "public, max-age=31536000, immutable"


@router.get("/v1/collections")
async def collections(registry: ServedRegistry) -> Response:
    """Every collection served."""
    served = registry.collections.values()
    data = [await registry.in_store(_describe, collection) for collection in served]
    return reply({"object": "list", "data": data})


@router.get("/v1/collections/{name}")
async def collection(name: str, registry: ServedRegistry) -> Response:
    """One collection, and the index it is searched with."""
    served = registry.collection(name)
    return reply(await registry.in_store(_describe, served), served.model)


@router.get("/v1/collections/{name}/items")
async def items(
    name: str,
    registry: ServedRegistry,
    request: Request,
    start_after: str = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Response:
    """Items in the order of their ids; the last id of a page is `start_after` of the next."""
    served = registry.collection(name)
    page = await registry.in_store(served.collection.scan, start_after, limit)
    generation = await registry.in_store(served.collection.generation)
    urls = [image_url(request, name, item.id, generation) for item in page]
    data = [_content(item, url) for item, url in zip(page, urls, strict=True)]
    return reply({"object": "list", "collection": name, "data": data}, served.model)


@router.put("/v1/collections/{name}/items", openapi_extra=request_docs(UpsertRequest))
async def upsert(name: str, request: Request, registry: ServedRegistry) -> Response:
    """Add or replace items, all or none; they are on disk when this answers."""
    served = registry.collection(name)
    served.check_writable()
    body = await read_json(request, UpsertRequest)
    check_count(len(body.items), registry.settings.max_items, "items")
    stored = _check_items(body.items)
    vectors, thumbnails = await _embed(body.items, served)
    await registry.in_store(served.collection.upsert, stored, vectors, thumbnails)
    generation = await registry.in_store(served.collection.generation)
    content = {"collection": name, "upserted": len(stored), "generation": generation}
    return reply(content, served.model)


# Before the item's own route, which would match as well.
@router.get("/v1/collections/{name}/items/{id:path}/image")
async def image(name: str, id: str, request: Request, registry: ServedRegistry) -> Response:
    """The small JPEG that was kept of an item's picture. With `?v=` it may be cached for ever."""
    if not _raw_path(request).endswith("/image"):  # an item whose own id ends so
        return await item(name, id, request, registry)
    served = registry.collection(name)
    jpeg = await registry.in_store(
        served.collection.thumbnail, _item_id(request).removesuffix("/image")
    )
    if jpeg is None:
        raise NotFound("no such item, or no picture was kept of it", param="id")
    etag = f'"{hashlib.sha256(jpeg).hexdigest()[:32]}"'
    headers = {
        "ETag": etag,
        "Cache-Control": _FOREVER if "v" in request.query_params else "no-cache",
        "X-Content-Type-Options": "nosniff",
        "X-Clipserve-Fingerprint": served.model.fingerprint,
    }
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(jpeg, headers=headers, media_type="image/jpeg")


@router.get("/v1/collections/{name}/items/{id:path}")
async def item(name: str, id: str, request: Request, registry: ServedRegistry) -> Response:
    """What is known of one item."""
    served = registry.collection(name)
    id = _item_id(request)
    found = await registry.in_store(served.collection.get, [id])
    if id not in found:
        raise NotFound("no such item", param="id", code="item_not_found")
    generation = await registry.in_store(served.collection.generation)
    content = _content(found[id], image_url(request, name, id, generation))
    return reply({"collection": name} | content, served.model)


@router.delete("/v1/collections/{name}/items/{id:path}")
async def delete(name: str, id: str, request: Request, registry: ServedRegistry) -> Response:
    """Remove an item; gone from disk when this answers."""
    served = registry.collection(name)
    served.check_writable()
    removed = await registry.in_store(served.collection.delete, [_item_id(request)])
    if not removed:
        raise NotFound("no such item", param="id", code="item_not_found")
    generation = await registry.in_store(served.collection.generation)
    content = {"collection": name, "deleted": removed, "generation": generation}
    return reply(content, served.model)


def _describe(served: ServedCollection) -> dict[str, Any]:
    collection = served.collection
    info = read_info(collection.path)
    return {
        "name": served.name,
        "object": "collection",
        "count": collection.count(),
        "embed_dim": collection.embed_dim,
        "generation": collection.generation(),
        "model": served.model.name,
        "fingerprint": served.model.fingerprint,
        "index": {"kind": info.kind, "reason": info.reason, "count": info.count} if info else None,
    }


def _content(item: Item, url: str) -> dict[str, Any]:
    return {
        "id": item.id,
        "caption": item.caption,
        "metadata": item.metadata,
        "image_url": url,
    }


def _raw_path(request: Request) -> str:
    """The path as it was sent, before %2F became a slash."""
    raw = request.scope.get("raw_path") or request.scope["path"].encode()
    return str(raw.decode("ascii", "surrogateescape"))


def _item_id(request: Request) -> str:
    """The id in the path; a text that cannot be one is not found."""
    _, _, quoted = _raw_path(request).partition("/items/")
    try:
        return unquote(quoted, errors="strict")
    except UnicodeDecodeError:
        raise NotFound("no such item", param="id", code="item_not_found") from None


def _check_items(given: list[UpsertItem]) -> list[Item]:
    """As they will be stored; what the collection would refuse is refused here, by its place."""
    seen: set[str] = set()
    stored = []
    for index, one in enumerate(given):
        item = Item(one.id, one.caption, "rest", one.metadata)
        try:
            check_item(item)
        except IndexStoreError:
            raise RequestError(
                f"items[{index}] cannot be stored: an id is 1 to 512 bytes of text, metadata is"
                " JSON without NaN",
                param=f"items[{index}]",
            ) from None
        if one.id in seen:
            raise RequestError(
                f"items[{index}].id is given twice; keep one", param=f"items[{index}].id"
            )
        seen.add(one.id)
        stored.append(item)
    return stored


async def _embed(
    given: list[UpsertItem], served: ServedCollection
) -> tuple[np.ndarray, list[bytes | None]]:
    """Vectors (N, E) and thumbnails, in the order given."""
    values = [_value(one, f"items[{i}]", served) for i, one in enumerate(given)]
    places = [i for i, value in enumerate(values) if not isinstance(value, np.ndarray)]
    inputs = [value for value in values if not isinstance(value, np.ndarray)]
    answer = await served.model.pipeline.embed(inputs, thumbnails=True)
    vectors = [value if isinstance(value, np.ndarray) else None for value in values]
    thumbnails: list[bytes | None] = [None] * len(given)
    for place, vector, thumbnail in zip(places, answer.vectors, answer.thumbnails, strict=True):
        if isinstance(vector, Exception):
            raise at(vector, f"items[{place}]")
        vectors[place], thumbnails[place] = vector, thumbnail
    return np.stack([vector for vector in vectors if vector is not None]), thumbnails


def _value(one: UpsertItem, place: str, served: ServedCollection) -> Input | np.ndarray:
    given = [kind for kind in ("image", "text", "vector") if getattr(one, kind) is not None]
    if len(given) != 1:
        raise RequestError(
            f"{place} needs exactly one of image, text and vector; {len(given)} were given",
            param=place,
        )
    if one.vector is not None:
        return parse_vector(one.vector, served.collection.embed_dim, f"{place}.vector")
    if one.image is not None:
        return parse_picture(one.image, f"{place}.image")
    return parse_text(one.text or "", f"{place}.text")
