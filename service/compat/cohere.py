"""Cohere's second API: /v2/embed and /v2/rerank (docs.cohere.com/v2/reference/embed).

`input_type` makes no difference to a CLIP. Its /v1/rerank is rerank.py.
"""

import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from service.bodies import read_json
from service.compat.rerank import rank
from service.compat.vectors import Lenient, check_whole, docs, embed, places_of
from service.errors import RequestError
from service.inputs import Input, parse_input_of
from service.replies import reply, written
from service.routes.embeddings import part_of
from service.routes.encodings import ENCODINGS, Encoding, encode
from service.routes.state import ServedRegistry
from service.schemas import Values

router = APIRouter(tags=["compatibility"])

_Encodings = Annotated[list[Encoding], Field(max_length=len(ENCODINGS), fail_fast=True)]


class CohereEmbedRequest(Lenient):
    """Exactly one of texts, images and inputs."""

    model: str | None = None
    texts: Values[str] | None = None
    images: Values[str] | None = None
    """data URIs"""
    inputs: Annotated[
        Values[Any] | None,
        Field(json_schema_extra={"items": {"type": "object"}}),
    ] = None
    """each {"content": [part]}; a part is {"type": "text", "text": ...} or {"type": "image_url",
    "image_url": {"url": data URI}}"""
    embedding_types: _Encodings | None = None
    """float when left out"""
    output_dimension: int | None = None
    """must be the model's own number, if given"""
    truncate: Literal["NONE", "END"] = "END"
    """NONE: a text that does not fit into the model's context is an error"""


class CohereRerankRequest(Lenient):
    """A query and the documents to order."""

    model: str | None = None
    query: str
    documents: Values[str]
    """texts, or pictures as data URIs"""
    top_n: Annotated[int, Field(ge=1)] | None = None


@router.post("/v2/embed", openapi_extra=docs(CohereEmbedRequest))
async def embed_v2(request: Request, registry: ServedRegistry) -> Response:
    """Vectors by the types asked for; `truncated` counts the texts that were cut."""
    body = await read_json(request, CohereEmbedRequest)
    served = registry.model(body.model)
    served.check_dimensions(body.output_dimension, "output_dimension")
    settings = registry.settings
    inputs, places = _parse(body, settings.max_items, settings.max_text_chars)
    answer = await embed(registry, served, inputs, places)
    if body.truncate == "NONE":
        check_whole(answer, places)
    rows = answer.rows()
    kinds: list[Encoding] = list(dict.fromkeys(body.embedding_types or ["float"]))

    def write() -> Response:
        content = {
            "id": uuid.uuid4().hex,
            "response_type": "embeddings_by_type",
            "embeddings": {kind: encode(rows, kind) for kind in kinds},
            "texts": body.texts or [],
            "truncated": sum(answer.truncated),
            "meta": _meta(sum(answer.num_tokens)),
        }
        return reply(content, served)

    return await written(registry.pool, rows.size * len(kinds), write)


@router.post("/v2/rerank", openapi_extra=docs(CohereRerankRequest))
async def rerank_v2(request: Request, registry: ServedRegistry) -> Response:
    """The documents' indexes, best first."""
    body = await read_json(request, CohereRerankRequest)
    served = registry.model(body.model)
    ranked = await rank(registry, served, body.query, body.documents, "documents")
    content = {
        "id": uuid.uuid4().hex,
        "results": [
            {"index": index, "relevance_score": score} for index, score in ranked.best(body.top_n)
        ],
        "score": ranked.kind,
        "truncated": ranked.truncated,
        "meta": _meta(ranked.num_tokens),
    }
    return reply(content, served)


def _parse(
    body: CohereEmbedRequest, max_items: int, max_chars: int
) -> tuple[list[Input], list[str]]:
    """What to embed, and where in the request each item is."""
    given: dict[str, list[Any] | None] = {
        "texts": body.texts,
        "images": body.images,
        "inputs": body.inputs,
    }
    kinds = [kind for kind, values in given.items() if values is not None]
    if len(kinds) != 1:
        raise RequestError(f"give exactly one of texts, images and inputs; {len(kinds)} were given")
    (kind,) = kinds
    values: Sequence[Any] = given[kind] or []
    places = places_of(kind, len(values), max_items)
    if kind == "inputs":
        pairs = [part_of(value, place) for value, place in zip(values, places, strict=True)]
    else:
        pairs = [(value, kind == "images") for value in values]
    inputs = [
        parse_input_of(value, place, is_image, max_chars)
        for (value, is_image), place in zip(pairs, places, strict=True)
    ]
    return inputs, places


def _meta(num_tokens: int) -> dict[str, Any]:
    return {"api_version": {"version": "2"}, "billed_units": {"input_tokens": num_tokens}}
