"""clip-retrieval's back end: /knn-service, /indices-list, /metadata (2.45.0, clip_back.py).

An index is a collection here, and an id its item's, a text. There is no safety model and no
aesthetic score; asking for them changes nothing, as in a back end that was started without.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from index.collection import Item
from index.search import MAX_HITS, Hit, Searcher
from service.bodies import parse_json
from service.compat.vectors import Lenient, cut_places, docs, embed, reply_bare
from service.errors import RequestError
from service.inputs import check_count, parse_picture, parse_text, parse_vector
from service.registry import Registry, ServedCollection
from service.replies import HIT_VALUES, Room, image_url, written
from service.routes.state import ServedRegistry
from service.schemas import K_MAX, Values

router = APIRouter(tags=["compatibility"])

_SAME = 0.94
"""the cosine from which clip-retrieval takes two pictures for one"""


class KnnRequest(Lenient):
    """A query by exactly one of text, image, image_url and embedding_input."""

    text: str | None = None
    image: str | None = None
    """base64"""
    image_url: str | None = None
    embedding_input: Values[float] | None = None
    modality: Literal["image", "text"] = "image"
    num_images: Annotated[int, Field(ge=1, le=K_MAX)] = 100
    """results that come with all that is known of them"""
    num_result_ids: Annotated[int, Field(ge=1, le=MAX_HITS)] | None = None
    """results in all, those behind with id and similarity alone; num_images when left out"""
    indice_name: str | None = None
    """a collection; may be left out when there is one"""
    deduplicate: bool = False


class MetadataRequest(Lenient):
    """Ids of results."""

    ids: Values[str]
    indice_name: str | None = None


@dataclass(frozen=True)
class _Found:
    """The hits of a query, and what is told of the first `num_images` of them, by id."""

    hits: list[Hit]
    items: dict[str, Item]
    pictures: dict[str, bytes]
    generation: int


@router.post("/knn-service", openapi_extra=docs(KnnRequest))
async def knn_service(request: Request, registry: ServedRegistry) -> Response:
    """The nearest items, best first."""
    body = await parse_json(request, KnnRequest, await request.body())  # ClipClient names no type
    served = registry.collection(body.indice_name)
    vector, truncated = await _embed(registry, served, body)
    searcher = await registry.searcher_of(served, body.modality)
    room = Room("num_images")
    found = await registry.in_store(served, _search, searcher, body, vector, room)

    def write() -> Response:
        content = [_line(request, served, hit, found) for hit in found.hits]
        return reply_bare(content, served.model, truncated)

    return await written(registry.pool, HIT_VALUES * len(found.hits) + room.values, write)


@router.get("/indices-list")
async def indices_list(registry: ServedRegistry) -> list[str]:
    """The names of the collections."""
    return list(registry.collections)


@router.post("/metadata", openapi_extra=docs(MetadataRequest))
async def metadata(request: Request, registry: ServedRegistry) -> Response:
    """What is known of results; ids that are not there are passed over."""
    body = await parse_json(request, MetadataRequest, await request.body())
    served = registry.collection(body.indice_name)
    check_count(len(body.ids), K_MAX, "ids")
    room = Room("ids")
    items, generation = await registry.in_store(served, _items, served, body.ids, room)

    def write() -> Response:
        found = ((id, items[id]) for id in body.ids if id in items)
        return reply_bare(
            [
                {"id": id, "metadata": _metadata(request, served, item, generation)}
                for id, item in found
            ],
            served.model,
        )

    return await written(registry.pool, HIT_VALUES * len(body.ids) + room.values, write)


async def _embed(
    registry: Registry, served: ServedCollection, body: KnnRequest
) -> tuple[np.ndarray, list[str]]:
    """(E,), and what was cut; clip-retrieval's clients send what they do not use as null, or an
    empty text."""
    given: dict[str, Any] = {
        "text": body.text or None,
        "image": body.image,
        "image_url": body.image_url,
        "embedding_input": body.embedding_input,
    }
    kinds = [kind for kind, value in given.items() if value is not None]
    if len(kinds) != 1:
        raise RequestError(
            f"give exactly one of text, image, image_url and embedding_input; {len(kinds)} were"
            " given"
        )
    (kind,) = kinds
    if kind == "embedding_input":
        return parse_vector(given[kind], served.collection.embed_dim, kind), []
    query = (
        parse_text(given[kind], kind, registry.settings.max_text_chars)
        if kind == "text"
        else parse_picture(given[kind], kind)
    )
    answer = await embed(registry, served.model, [query], [kind])
    return answer.rows()[0], cut_places(answer.truncated, [kind])


def _search(searcher: Searcher, body: KnnRequest, vector: np.ndarray, room: Room) -> _Found:
    k = body.num_result_ids or body.num_images
    room.take_hits(k)
    hits = searcher.search(
        vector[None],
        k,
        unique=_SAME if body.deduplicate else None,
        with_items=False,
    )[0]
    first = [hit.id for hit in hits[: body.num_images]]
    collection = searcher.collection
    with collection.snapshot() as generation:
        rowids = collection.rowids_of(first)
        rows = np.array(list(rowids.values()), dtype=np.int64)
        room.take(sum(collection.sizes_of(rows).values()))
        room.take(sum(collection.thumbnail_sizes_of(rows).values()))
        pictures = collection.thumbnails_of(rows)
        items = collection.get(first)
    by_id = {id: pictures[rowid] for id, rowid in rowids.items() if rowid in pictures}
    return _Found(hits, items, by_id, generation)


def _items(served: ServedCollection, ids: Sequence[str], room: Room) -> tuple[dict[str, Item], int]:
    """Items by id, and the collection's generation."""
    collection = served.collection
    room.take_hits(len(ids))
    with collection.snapshot() as generation:
        rowids = collection.rowids_of(ids)
        sizes = collection.sizes_of(np.array(list(rowids.values()), dtype=np.int64))
        room.take(sum(sizes[rowids[id]] for id in ids if id in rowids))
        return collection.get(ids), generation


def _line(request: Request, served: ServedCollection, hit: Hit, found: _Found) -> dict[str, Any]:
    line: dict[str, Any] = {}
    if hit.id in found.items:
        line = _metadata(request, served, found.items[hit.id], found.generation)
        if hit.id in found.pictures:
            line.setdefault("image", base64.b64encode(found.pictures[hit.id]).decode("ascii"))
    return line | {"id": hit.id, "similarity": hit.score}


def _metadata(
    request: Request, served: ServedCollection, item: Item, generation: int
) -> dict[str, Any]:
    """The item's own metadata, which may name the picture's url, and its caption."""
    url = str(request.base_url)[:-1] + image_url(request, served.name, item.id, generation)
    return {"url": url, "caption": item.caption} | item.metadata
