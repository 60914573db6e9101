"""/v1/collections: what is served, making, dropping and counting; `items.py` is what is in them."""

import contextlib
from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic_core import from_json
from starlette.responses import Response

from clipserve.errors import CollectionClosed
from index.cache import read_info
from index.filters import Filter, parse
from service.auth import require
from service.bodies import read_json
from service.errors import RequestError
from service.registry import ServedCollection
from service.replies import reply
from service.routes.state import ServedRegistry
from service.schemas import CreateRequest, request_docs

router = APIRouter(tags=["collections"])


@router.get("/v1/collections")
async def collections(registry: ServedRegistry) -> Response:
    """Every collection served, and those that are here but unavailable, with the reason."""
    data = []
    for served in list(registry.collections.values()):
        with contextlib.suppress(CollectionClosed):  # it is being dropped
            data.append(await registry.in_store(served, _describe, served))
    unavailable = [
        {
            "name": lost.name,
            "object": "collection",
            "model": lost.model_name,
            "fingerprint": lost.fingerprint,
            "reason": lost.reason,
        }
        for lost in registry.unavailable.values()
    ]
    return reply({"object": "list", "data": data, "unavailable": unavailable})


# Before the collection's own route, which would match as well.
@router.post(
    "/v1/collections/{name}:rebuild", status_code=202, dependencies=[Depends(require("write"))]
)
async def rebuild(name: str, registry: ServedRegistry) -> Response:
    """Build the index anew, in the background; searches go on with the old one until it is there.

    As the one before was asked for. The collection says `rebuilding` until then.
    """
    served = registry.collection(name)
    served.check_writable()
    served.start_rebuild()
    return reply({"collection": name, "state": "rebuilding"}, served.model, status=202)


@router.put(
    "/v1/collections/{name}",
    status_code=201,
    dependencies=[Depends(require("write"))],
    openapi_extra=request_docs(CreateRequest),
)
async def create(name: str, request: Request, registry: ServedRegistry) -> Response:
    """Make an empty collection, below CLIPSERVE_COLLECTIONS_ROOT, for a model's vectors."""
    body = await read_json(request, CreateRequest, optional=True)
    served = await registry.create_collection(name, body.model)
    return reply(await registry.in_store(served, _describe, served), served.model, status=201)


@router.get("/v1/collections/{name}")
async def collection(name: str, registry: ServedRegistry) -> Response:
    """One collection, and the index it is searched with.

    `stale` says that its model was replaced by another checkpoint; it is searched with the old one.
    """
    served = registry.collection(name)
    return reply(await registry.in_store(served, _describe, served), served.model)


@router.delete("/v1/collections/{name}", dependencies=[Depends(require("admin"))])
async def drop(name: str, registry: ServedRegistry) -> Response:
    """Remove a collection, and all that is in it, from disk, also one that is unavailable."""
    served = registry.collections.get(name)
    await registry.drop_collection(name)
    model = None if served is None else served.model
    return reply({"collection": name, "dropped": True}, model)


@router.get("/v1/collections/{name}/count")
async def count(name: str, registry: ServedRegistry, filter: str | None = None) -> Response:
    """How many items there are, or how many a filter, as JSON, holds for."""
    served = registry.collection(name)
    wanted = None if filter is None else _parse_filter(filter)
    number = await registry.in_store(served, served.searcher.count, wanted)
    return reply({"collection": name, "count": number}, served.model)


def _describe(served: ServedCollection) -> dict[str, Any]:
    collection = served.collection
    info = read_info(collection.path)
    stats = served.searcher.stats()
    return {
        "name": served.name,
        "object": "collection",
        "count": collection.count(),
        "embed_dim": collection.embed_dim,
        "dtype": collection.dtype.name,
        "generation": collection.generation(),
        "model": served.model.name,
        "fingerprint": served.model.fingerprint,
        "stale": served.stale,
        "searched": {"indexed": stats.indexed, "fresh": stats.fresh, "dead": stats.dead},
        "rebuilding": served.is_rebuilding,
        "index": {
            "kind": info.kind,
            "reason": info.reason,
            "count": info.count,
            "generation": info.generation,
            "memory_bytes": info.memory_bytes,
            "recall_target": info.recall_target,
        }
        if info
        else None,
    }


def _parse_filter(text: str) -> Filter:
    try:
        value = from_json(text)
    except ValueError:
        raise RequestError(
            'filter is not JSON; write for example {"color": "red", "price": {"lt": 10}}',
            param="filter",
            code="invalid_filter",
        ) from None
    return parse(value)
