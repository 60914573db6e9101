"""POST /rerank and /v1/rerank: documents, texts or pictures, ordered by how they fit a query.

One body for the clients of Infinity, Cohere v1, Jina and TEI, told apart by what they send. The
score is the cosine; where the model is an ALBEF and one side are pictures and the other texts, it
is the probability of a match, read jointly.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from service.bodies import read_json
from service.compat.vectors import Lenient, cut_places, docs, embed, places_of, reply_bare
from service.errors import RequestError, at
from service.inputs import Input, Picture, fetched, parse_input
from service.registry import Registry, ServedModel
from service.replies import reply, values_of, written
from service.routes.state import ServedRegistry
from service.schemas import Values

router = APIRouter(tags=["compatibility"])

_ITEM = {
    "anyOf": [
        {"type": "string"},
        {"type": "object", "properties": {"text": {"type": "string"}}},
        {"type": "object", "properties": {"image": {"type": "string"}}},
    ]
}


class RerankRequest(Lenient):
    """A query and the documents to order; `texts` in their place is TEI's way."""

    model: str | None = None
    query: Annotated[Any, Field(json_schema_extra=_ITEM)]
    """a text, {"text": ...} or {"image": base64 or data URI}"""
    documents: Annotated[Values[Any] | None, Field(json_schema_extra={"items": _ITEM})] = None
    """each as the query; a string that begins with data:image/ is a picture"""
    texts: Values[str] | None = None
    top_n: Annotated[int, Field(ge=1)] | None = None
    """how many to return; all when left out"""
    return_documents: bool = False
    return_text: bool = False


@dataclass(frozen=True)
class Ranked:
    """Scores of the documents, in the order given."""

    scores: np.ndarray
    kind: Literal["cosine", "matching"]
    num_tokens: int
    truncated: list[str]
    """places in the request of texts that did not fit into the model's context"""

    def best(self, top_n: int | None = None) -> list[tuple[int, float]]:
        """Indexes and scores, best first, equal ones in the order given."""
        order = np.argsort(-self.scores, kind="stable")[:top_n]
        return [(int(index), float(self.scores[index])) for index in order]


@router.post("/rerank", openapi_extra=docs(RerankRequest))
async def rerank(request: Request, registry: ServedRegistry) -> Response:
    """Infinity's shape, where a returned document is a string; TEI's when `texts` are sent."""
    body = await read_json(request, RerankRequest)
    if body.texts is not None:
        return await _answer_tei(request, registry, body, body.texts)
    return await _answer(request, registry, body, as_object=False)


@router.post("/v1/rerank", openapi_extra=docs(RerankRequest))
async def rerank_v1(request: Request, registry: ServedRegistry) -> Response:
    """Cohere's and Jina's shape, where a returned document is an object."""
    body = await read_json(request, RerankRequest)
    return await _answer(request, registry, body, as_object=True)


async def rank(
    registry: Registry, served: ServedModel, query: Any, documents: Sequence[Any], param: str
) -> Ranked:
    """Score documents, called `param` in the request, for a query."""
    settings = registry.settings
    places = places_of(param, len(documents), settings.max_items)
    places = ["query", *places]
    given = [
        parse_document(value, place, settings.max_text_chars)
        for value, place in zip([query, *documents], places, strict=True)
    ]
    if served.model.has_fusion and _are_pairs(given):
        return await _match(registry, served, given, places)
    answer = await embed(registry, served, given, places)
    rows = answer.rows()
    cut = cut_places(answer.truncated, places)
    return Ranked(rows[1:] @ rows[0], "cosine", sum(answer.num_tokens), cut)


def parse_document(value: Any, place: str, max_chars: int) -> Input:
    """A text, or a picture as a data URI or as {"image": ...}."""
    is_image = isinstance(value, str) and value[:11].lower() == "data:image/"
    return parse_input(value, place, images=is_image, max_chars=max_chars)


def _are_pairs(given: Sequence[Input]) -> bool:
    """Whether the query is a picture and all documents are texts, or the other way round."""
    is_picture = [isinstance(item, Picture) for item in given]
    return all(one is not is_picture[0] for one in is_picture[1:])


async def _match(
    registry: Registry, served: ServedModel, given: Sequence[Input], places: Sequence[str]
) -> Ranked:
    """By the probability of a match of the first with each of the others."""
    query, *documents = await fetched(given, registry.fetcher)
    queries = [query] * len(documents)
    is_picture = isinstance(query, Picture)
    images, texts = (queries, documents) if is_picture else (documents, queries)
    found = await served.match(images, texts)
    scores = []
    for place, score in zip(places[1:], found.probabilities, strict=True):
        if isinstance(score, Exception):
            raise at(score, "query" if is_picture else place)
        scores.append(score)
    text_places = places[1:] if is_picture else ["query"] * len(documents)
    cut = list(dict.fromkeys(cut_places(found.truncated, text_places)))
    return Ranked(np.array(scores), "matching", 0, cut)


async def _answer(
    request: Request, registry: Registry, body: RerankRequest, *, as_object: bool
) -> Response:
    if body.documents is None:
        raise RequestError("documents is missing; give at least one", param="documents")
    served = registry.model(body.model)
    ranked = await rank(registry, served, body.query, body.documents, "documents")
    results: list[dict[str, Any]] = []
    for index, score in ranked.best(body.top_n):
        result: dict[str, Any] = {"index": index, "relevance_score": score}
        if body.return_documents:
            document = body.documents[index]
            is_text = isinstance(document, str)
            result["document"] = {"text": document} if is_text and as_object else document
        results.append(result)
    content = {
        "object": "rerank",
        "id": uuid.uuid4().hex,
        "results": results,
        "score": ranked.kind,
        "truncated": ranked.truncated,
        "usage": {"prompt_tokens": ranked.num_tokens, "total_tokens": ranked.num_tokens},
    }
    size = values_of(len(await request.body())) if body.return_documents else 0
    return await written(registry.pool, size, lambda: reply(content, served))


async def _answer_tei(
    request: Request, registry: Registry, body: RerankRequest, texts: Sequence[str]
) -> Response:
    served = registry.model(body.model)
    ranked = await rank(registry, served, body.query, texts, "texts")
    content = [
        {"index": index, "score": score} | ({"text": texts[index]} if body.return_text else {})
        for index, score in ranked.best()
    ]
    size = values_of(len(await request.body())) if body.return_text else 0
    return await written(registry.pool, size, lambda: reply_bare(content, served, ranked.truncated))
