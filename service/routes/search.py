"""POST /v1/search: a text, a picture or a vector -> the nearest items of a collection."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from index.search import Hit
from service.errors import RequestError, at
from service.inputs import Input, Picture, parse_picture, parse_text, parse_vector
from service.registry import ServedCollection
from service.replies import image_url, reply
from service.routes.state import ServedRegistry
from service.schemas import K_MAX, SearchRequest, is_form, read_form, read_json, request_docs

router = APIRouter(tags=["search"])

_FORM = {
    "file": {"type": "string", "format": "binary"},
    "text": {"type": "string"},
    "k": {"type": "integer"},
    "collection": {"type": "string"},
}


@dataclass(frozen=True)
class _Query:
    collection: str | None
    k: int
    kind: str
    value: Input | list[float]


@router.post("/v1/search", openapi_extra=request_docs(SearchRequest, _FORM))
async def search(request: Request, registry: ServedRegistry) -> Response:
    """The k items of highest cosine similarity, best first; equal scores by id."""
    query = await _read(request)
    served = registry.collection(query.collection)
    vector, truncated = await _embed(query, served)
    hits = (await registry.in_store(served.searcher.search, vector[None], query.k))[0]
    generation = await registry.in_store(served.collection.generation)
    urls = [image_url(request, served.name, hit.id, generation) for hit in hits]
    content = {
        "object": "list",
        "collection": served.name,
        "query": {"kind": query.kind, "truncated": truncated},
        "hits": [_hit(hit, url) for hit, url in zip(hits, urls, strict=True)],
    }
    return reply(content, served.model)


def _hit(hit: Hit, url: str) -> dict[str, Any]:
    return {
        "id": hit.id,
        "score": hit.score,
        "caption": hit.caption,
        "metadata": hit.metadata,
        "image_url": url,
    }


async def _read(request: Request) -> _Query:
    if not is_form(request):
        body = await read_json(request, SearchRequest)
        given: dict[str, Any] = {"text": body.text, "image": body.image, "vector": body.vector}
        return _query(body.collection, body.k, given)
    form = await read_form(request, _FORM, max_files=1, max_fields=20)
    given = {"text": form.one("text"), "image": form.files[0] if form.files else None}
    return _query(form.one("collection"), form.number("k", 1, K_MAX) or 10, given)


def _query(collection: str | None, k: int, given: dict[str, Any]) -> _Query:
    kinds = [kind for kind, value in given.items() if value is not None]
    if len(kinds) != 1:
        raise RequestError(f"give exactly one of text, image and vector; {len(kinds)} were given")
    kind = kinds[0]
    value = given[kind]
    if kind == "text":
        value = parse_text(value, "text")
    elif kind == "image":
        value = Picture(value) if isinstance(value, bytes) else parse_picture(value, "image")
    return _Query(collection, k, kind, value)


async def _embed(query: _Query, served: ServedCollection) -> tuple[np.ndarray, bool]:
    """The query's vector (E,), and whether its text was cut."""
    if isinstance(query.value, list):
        return parse_vector(query.value, served.collection.embed_dim, "vector"), False
    answer = await served.model.pipeline.embed([query.value])
    vector = answer.vectors[0]
    if isinstance(vector, Exception):
        raise at(vector, query.kind)
    return vector, answer.truncated[0]
