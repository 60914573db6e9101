"""POST /v1/search: texts, pictures, items and vectors -> the nearest items of a collection."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from clipserve.errors import IndexStoreError
from index import query as mixing
from index.filters import Filter, parse
from index.rerank import candidates, pictures_of
from index.search import Hit, Searcher
from service.bodies import read
from service.errors import NotFound, RequestError, at
from service.inputs import (
    Input,
    Picture,
    Text,
    check_count,
    fetched,
    parse_picture,
    parse_text,
    parse_vector,
)
from service.registry import Registry, ServedCollection
from service.replies import HIT_VALUES, Room, image_url, reply, written
from service.routes.state import ServedRegistry
from service.schemas import Part, Query, SearchRequest, WeightedPart, request_docs

_KINDS = ("text", "image", "vector", "id")
_MAX_HITS = 10_000
"""of all queries of one request, those that are passed over included"""
_MAX_VECTORS = 1000


router = APIRouter(tags=["search"])


@dataclass(frozen=True)
class _Term:
    """A part of a query, checked."""

    kind: str
    place: str
    value: Input | np.ndarray | str
    """of an id the id"""
    weight: float


@dataclass
class _Asked:
    """One query: what it is made of, and how it is told of."""

    terms: list[_Term]
    truncated: bool = False

    @property
    def kind(self) -> str:
        return self.terms[0].kind if len(self.terms) == 1 else "mixed"

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(str(t.value) for t in self.terms if t.kind == "id"))


@dataclass
class _Found:
    """The hits of each query, and what is told of them."""

    hits: list[list[Hit]]
    room: Room
    """what they took"""
    pictures: dict[str, bytes] = field(default_factory=dict)
    """by id, to order the hits anew"""
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    """by id, where they were asked for"""
    generation: int = 0


@router.post("/v1/search", openapi_extra=request_docs(SearchRequest, pictures=True))
async def search(request: Request, registry: ServedRegistry) -> Response:
    """The k items of highest cosine similarity, best first; equal scores by id.

    A query is one text, image, vector or id, or several of them weighted and summed (`queries`);
    `batch` asks several queries at once, which are answered in `results`.
    """
    body, files = await read(request, SearchRequest, max_files=1)
    served = registry.collection(body.collection)
    asked = _parse(body, files, served, registry)
    filter = None if body.filter is None else parse(body.filter)
    _check_hits(body, len(asked))
    _check_rerank(body, asked, served, registry)
    known = await _embed(asked, served, registry)
    searcher = await registry.searcher_of(served, body.field)
    found = await registry.in_store(served, _search, body, filter, asked, known, searcher)
    if body.rerank:
        found.hits = await _rerank(body, asked, found, served)
        found = await registry.in_store(served, _complete, body, found, searcher)
    hit_size = HIT_VALUES + body.with_vectors * served.collection.embed_dim
    size = sum(map(len, found.hits)) * hit_size + found.room.values
    return await written(registry.pool, size, lambda: _reply(request, body, asked, found, served))


def _parse(
    body: SearchRequest, files: list[bytes], served: ServedCollection, registry: Registry
) -> list[_Asked]:
    """The queries, one or a batch."""
    dim, limit = served.collection.embed_dim, registry.settings.max_text_chars
    if body.batch is None:
        terms = _terms(body, "", dim, limit)
        terms += [_Term("image", "file", Picture(file), 1.0) for file in files]
        queries = [terms]
    elif files or _given(body) or body.queries is not None:
        raise RequestError("give a batch of queries or one query, not both", param="batch")
    else:
        check_count(len(body.batch), registry.settings.max_items, "batch")
        queries = [_terms(one, f"batch[{i}].", dim, limit) for i, one in enumerate(body.batch)]
    count = sum(map(len, queries))
    if count:
        check_count(count, registry.settings.max_items, "queries")
    for i, terms in enumerate(queries):
        if not 1 <= len(terms) <= mixing.MAX_PARTS:
            raise RequestError(
                f"give exactly one of text, image, vector and id, or up to {mixing.MAX_PARTS}"
                f" queries to mix; {len(terms)} were given",
                param=None if body.batch is None else f"batch[{i}]",
            )
    return [_Asked(terms) for terms in queries]


def _terms(query: Query, place: str, embed_dim: int, max_chars: int) -> list[_Term]:
    own = _given(query)
    if len(own) > 1 or (own and query.queries is not None):
        raise RequestError(
            f"give exactly one of text, image, vector and id, or mix them in queries; {len(own)}"
            " were given",
            param=place[:-1] or None,
        )
    if own:
        return [_term(query, f"{place}{own[0]}", own[0], 1.0, embed_dim, max_chars)]
    terms = []
    for i, part in enumerate(query.queries or []):
        kinds = _given(part)
        if len(kinds) != 1 or part.weight == 0:
            raise RequestError(
                f"{place}queries[{i}] needs exactly one of text, image, vector and id, and a"
                " weight that is not 0",
                param=f"{place}queries[{i}]",
            )
        name = f"{place}queries[{i}].{kinds[0]}"
        terms.append(_term(part, name, kinds[0], part.weight, embed_dim, max_chars))
    return terms


def _given(part: Part) -> list[str]:
    return [kind for kind in _KINDS if getattr(part, kind) is not None]


def _term(
    part: Part | WeightedPart,
    place: str,
    kind: str,
    weight: float,
    embed_dim: int,
    max_chars: int,
) -> _Term:
    value: Any = getattr(part, kind)
    if kind == "text":
        value = parse_text(value, place, max_chars)
    elif kind == "image":
        value = parse_picture(value, place)
    elif kind == "vector":
        value = parse_vector(value, embed_dim, place)
    return _Term(kind, place, value, weight)


def _check_hits(body: SearchRequest, count: int) -> None:
    found, answered = count * (body.offset + body.k), count * body.k
    if found > _MAX_HITS:
        raise RequestError(
            f"{count} queries of offset + k hits are {found}; at most {_MAX_HITS} are allowed in"
            " one request",
            param="k",
            code="too_many_items",
        )
    if body.with_vectors and answered > _MAX_VECTORS:
        raise RequestError(
            f"{count} queries of k hits are {answered} vectors; at most {_MAX_VECTORS} are allowed"
            " in one request",
            param="with_vectors",
            code="too_many_items",
        )


def _check_rerank(
    body: SearchRequest, asked: Sequence[_Asked], served: ServedCollection, registry: Registry
) -> None:
    if not body.rerank:
        return
    if not served.model.model.has_fusion:
        raise RequestError(
            "rerank reads text and picture together, and this collection's model only compares"
            " vectors; use one that was trained to match (ALBEF)",
            param="rerank",
            code="no_matching",
        )
    if any(one.kind != "text" for one in asked):
        raise RequestError(
            "rerank orders by how one text fits a picture; ask by text alone", param="rerank"
        )
    check_count(body.k_test * len(asked), registry.settings.max_items, "k_test")


async def _embed(
    asked: Sequence[_Asked], served: ServedCollection, registry: Registry
) -> dict[str, np.ndarray]:
    """The vectors of texts and pictures by place; all go to the model together."""
    terms = [term for one in asked for term in one.terms]
    to_embed = [term for term in terms if not isinstance(term.value, np.ndarray | str)]
    inputs: list[Input] = [t.value for t in to_embed if not isinstance(t.value, np.ndarray | str)]
    if not inputs:
        return {}
    answer = await served.model.pipeline.embed(await fetched(inputs, registry.fetcher))
    known: dict[str, np.ndarray] = {}
    for term, vector in zip(to_embed, answer.vectors, strict=True):
        if isinstance(vector, Exception):
            raise at(vector, term.place)
        known[term.place] = vector
    cut = {term.place for term, is_cut in zip(to_embed, answer.truncated, strict=True) if is_cut}
    for one in asked:
        one.truncated = any(term.place in cut for term in one.terms)
    return known


def _search(
    body: SearchRequest,
    filter: Filter | None,
    asked: Sequence[_Asked],
    known: dict[str, np.ndarray],
    searcher: Searcher,
) -> _Found:
    """All that is read of the collection, in one go: in pieces, the first ones of all searches
    would be done, and held, before the second one of any."""
    room = Room("k")
    vectors = _resolve(asked, known, searcher)
    found = _Found(_find(body, filter, asked, vectors, searcher, room), room)
    if not body.rerank:
        return _complete(body, found, searcher)
    found.pictures = pictures_of(searcher.collection, candidates(found.hits, body.k_test))
    room.hold(sum(map(len, found.pictures.values())))
    return found


def _resolve(
    asked: Sequence[_Asked], known: dict[str, np.ndarray], searcher: Searcher
) -> np.ndarray:
    """The queries' unit vectors (Q, E)."""
    if ids := [term for one in asked for term in one.terms if term.kind == "id"]:
        known = known | _stored(ids, searcher)
    queries = []
    for one in asked:
        parts = [(_vector(term, known), term.weight) for term in one.terms]
        queries.append(mixing.Query(vectors=parts))
    try:
        return mixing.resolve(None, searcher.collection, queries)
    except IndexStoreError as error:  # of vectors alone: their sum has no direction left
        raise RequestError(str(error), param="queries", code="no_direction") from None


def _vector(term: _Term, known: dict[str, np.ndarray]) -> np.ndarray:
    return term.value if isinstance(term.value, np.ndarray) else known[term.place]


def _stored(terms: Sequence[_Term], searcher: Searcher) -> dict[str, np.ndarray]:
    """The vectors that items have in the field that is searched, by place."""
    collection, field = searcher.collection, searcher.field
    with collection.snapshot():
        rowids = collection.rowids_of(str(term.value) for term in terms)
        for term in terms:
            if term.value not in rowids:
                raise NotFound(
                    f"{term.place} is no item of the collection",
                    param=term.place,
                    code="item_not_found",
                )
        wanted = np.array([rowids[str(term.value)] for term in terms])
        is_there = np.isin(wanted, collection.rowids(field))
        if not is_there.all():
            place = terms[int(np.flatnonzero(~is_there)[0])].place
            raise RequestError(f"{place} has no {field} vector to search with", param=place)
        vectors = collection.vectors_of(wanted, field)
    return {term.place: vector for term, vector in zip(terms, vectors, strict=True)}


def _find(
    body: SearchRequest,
    filter: Filter | None,
    asked: Sequence[_Asked],
    vectors: np.ndarray,
    searcher: Searcher,
    room: Room,
) -> list[list[Hit]]:
    """Queries that leave the same items out are searched for together."""
    k, offset = body.k, body.offset
    if body.rerank:  # an offset into the order that there will be
        k, offset = max(body.k_test, body.offset + body.k), 0
    room.take_hits(k * len(asked))
    hits: list[list[Hit]] = [[] for _ in asked]
    for exclude, places in _together(asked):
        found = searcher.search(
            vectors[places],
            k,
            filter=filter,
            offset=offset,
            min_score=body.min_score,
            unique=body.deduplicate,
            exclude=exclude,
            exact=body.exact,
            admit=room.take,
        )
        for place, own in zip(places, found, strict=True):
            hits[place] = own
    return hits


async def _rerank(
    body: SearchRequest, asked: Sequence[_Asked], found: _Found, served: ServedCollection
) -> list[list[Hit]]:
    texts = [one.terms[0].value.text for one in asked if isinstance(one.terms[0].value, Text)]
    model, k_test = served.model, body.k_test
    again = await model.rerank(
        texts, found.hits, found.pictures, k_test=k_test, score=body.rerank_score
    )
    return [own[body.offset : body.offset + body.k] for own in again]


def _complete(body: SearchRequest, found: _Found, searcher: Searcher) -> _Found:
    """With what depends on the hits that are answered."""
    if body.with_vectors:
        ids = [hit.id for own in found.hits for hit in own]
        found.room.hold(4 * searcher.collection.embed_dim * len(ids))
        found.vectors = _vectors(ids, searcher)
    found.generation = searcher.collection.generation()
    return found


def _together(asked: Sequence[_Asked]) -> Iterator[tuple[tuple[str, ...], list[int]]]:
    places: dict[tuple[str, ...], list[int]] = {}
    for place, one in enumerate(asked):
        places.setdefault(one.ids, []).append(place)
    yield from places.items()


def _vectors(ids: Sequence[str], searcher: Searcher) -> dict[str, np.ndarray]:
    """Of those that are still there."""
    if not ids:
        return {}
    with searcher.collection.snapshot():
        rowids = searcher.collection.rowids_of(dict.fromkeys(ids))
        rows = searcher.collection.vectors_of(np.array(list(rowids.values())), searcher.field)
    return dict(zip(rowids, rows, strict=True))


def _reply(
    request: Request,
    body: SearchRequest,
    asked: Sequence[_Asked],
    found: _Found,
    served: ServedCollection,
) -> Response:
    results = []
    for one, own in zip(asked, found.hits, strict=True):
        hits = []
        for hit in own:
            url = image_url(request, served.name, hit.id, found.generation)
            hits.append(_hit(hit, url, found.vectors.get(hit.id), body.with_vectors))
        results.append({"query": {"kind": one.kind, "truncated": one.truncated}, "hits": hits})
    content = {"object": "list", "collection": served.name, "stale": served.stale}
    answer: dict[str, Any] = results[0] if body.batch is None else {"results": results}
    return reply({**content, **answer}, served.model)


def _hit(hit: Hit, url: str, vector: np.ndarray | None, with_vectors: bool) -> dict[str, Any]:
    content: dict[str, Any] = {
        "id": hit.id,
        "score": hit.score,
        "caption": hit.caption,
        "metadata": hit.metadata,
        "image_url": url,
    }
    if hit.matching is not None:
        content["matching"] = hit.matching
    if with_vectors:
        content["vector"] = vector
    return content
