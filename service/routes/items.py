"""/v1/collections/{name}/items: what is in a collection, item by item, and changing that.

An id is any text. In a path it is percent-encoded, "/" too (%2F), which is why ids are read from
the path as it was sent: of the decoded one, `a/image` could be an item or the picture of `a`.
"""

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from index.collection import Item
from service.auth import require
from service.bodies import read_json
from service.errors import NotFound, RequestError
from service.inputs import check_count
from service.registry import ServedCollection
from service.replies import HIT_VALUES, Room, image_url, reply, written
from service.routes.state import ServedRegistry
from service.schemas import DeleteRequest, UpsertItem, UpsertRequest, request_docs
from service.upserts import Prepared, prepare, store

router = APIRouter(tags=["items"])

_FOREVER = "private, max-age=31536000, immutable"
_WRITE = [Depends(require("write"))]
_MAX_DELETED = 10_000


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
    room = Room("limit")
    page, generation = await registry.in_store(served, _scan, served, start_after, limit, room)

    def write() -> Response:
        data = [_content(item, image_url(request, name, item.id, generation)) for item in page]
        return reply({"object": "list", "collection": name, "data": data}, served.model)

    return await written(registry.pool, HIT_VALUES * len(page) + room.values, write)


@router.put(
    "/v1/collections/{name}/items",
    dependencies=_WRITE,
    openapi_extra=request_docs(UpsertRequest),
)
async def upsert(name: str, request: Request, registry: ServedRegistry) -> Response:
    """Add or replace items, all or none; they are on disk when this answers.

    `truncated` names, by their places, the items whose text did not fit into the model's context.
    """
    served = registry.collection(name)
    served.check_writable()
    body = await read_json(request, UpsertRequest)
    check_count(len(body.items), registry.settings.max_items, "items")
    _check_distinct(body.items)
    places = [f"items[{i}]" for i in range(len(body.items))]
    ready: list[Prepared] = []
    for one in await prepare(body.items, places, served, registry):
        if isinstance(one, Exception):
            raise one
        ready.append(one)
    generation = await registry.in_store(served, store, served.collection, ready)
    content = {
        "collection": name,
        "upserted": len(ready),
        "truncated": [i for i, one in enumerate(ready) if one.truncated],
        "generation": generation,
    }
    return reply(content, served.model)


@router.post(
    "/v1/collections/{name}/items:delete",
    dependencies=_WRITE,
    openapi_extra=request_docs(DeleteRequest),
)
async def delete_many(name: str, request: Request, registry: ServedRegistry) -> Response:
    """Remove items, all in one write; ids that are not there are passed over."""
    served = registry.collection(name)
    served.check_writable()
    body = await read_json(request, DeleteRequest)
    check_count(len(body.ids), _MAX_DELETED, "ids")
    removed, generation = await registry.in_store(served, _delete, served, body.ids)
    content = {"collection": name, "deleted": removed, "generation": generation}
    return reply(content, served.model)


# Before the item's own route, which would match as well.
@router.get("/v1/collections/{name}/items/{id:path}/image")
async def image(name: str, id: str, request: Request, registry: ServedRegistry) -> Response:
    """The small JPEG that was kept of an item's picture. With `?v=` it may be cached for ever."""
    if not _raw_path(request).endswith("/image"):  # an item whose own id ends so
        return await item(name, id, request, registry)
    served = registry.collection(name)
    jpeg = await registry.in_store(
        served, served.collection.thumbnail, _item_id(request, name).removesuffix("/image")
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
    found, generation = await registry.in_store(served, _get, served, _item_id(request, name))
    content = _content(found, image_url(request, name, found.id, generation))
    return reply({"collection": name} | content, served.model)


@router.delete("/v1/collections/{name}/items/{id:path}", dependencies=_WRITE)
async def delete(name: str, id: str, request: Request, registry: ServedRegistry) -> Response:
    """Remove an item; gone from disk when this answers."""
    served = registry.collection(name)
    served.check_writable()
    removed, generation = await registry.in_store(
        served, _delete, served, [_item_id(request, name)]
    )
    if not removed:
        raise NotFound("no such item", param="id", code="item_not_found")
    content = {"collection": name, "deleted": removed, "generation": generation}
    return reply(content, served.model)


def _scan(
    served: ServedCollection, start_after: str, limit: int, room: Room
) -> tuple[list[Item], int]:
    collection = served.collection
    with collection.snapshot() as generation:
        sizes = collection.sizes_of(collection.page_rowids(start_after, limit))
        room.take_hits(len(sizes))
        room.take(sum(sizes.values()))
        return collection.scan(start_after, limit), generation


def _get(served: ServedCollection, id: str) -> tuple[Item, int]:
    found = served.collection.get([id])
    if id not in found:
        raise NotFound("no such item", param="id", code="item_not_found")
    return found[id], served.collection.generation()


def _delete(served: ServedCollection, ids: Sequence[str]) -> tuple[int, int]:
    return served.collection.delete(ids), served.collection.generation()


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


def _item_id(request: Request, name: str) -> str:
    """The id in the path; a text that cannot be one is not found."""
    _, _, below = _raw_path(request).partition("/v1/collections/")
    collection, _, rest = below.partition("/")
    _, _, quoted = rest.partition("/")
    try:
        if unquote(collection) == name:  # not so of a name with %2F, which is none
            return unquote(quoted, errors="strict")
    except UnicodeDecodeError:
        pass
    raise NotFound("no such item", param="id", code="item_not_found")


def _check_distinct(given: Sequence[UpsertItem]) -> None:
    seen: set[str] = set()
    for index, one in enumerate(given):
        if one.id in seen:
            raise RequestError(
                f"items[{index}].id is given twice; keep one", param=f"items[{index}].id"
            )
        seen.add(one.id)
