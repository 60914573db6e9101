"""clip-as-service's one route, POST /post with the endpoints /encode and /rank (0.8.3).

clip_client turns files and URLs into bytes itself and sends them as `blob`. A picture is that, or a
data URI in `uri`. Vectors are of unit length here, which clip-as-service's are not.
"""

import uuid
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Request
from pydantic import AliasChoices, Field
from starlette.responses import Response

from clipserve.prompts import head_from_prompts
from service.bodies import read_json
from service.compat.vectors import Lenient, cut_places, docs, embed, reply_bare
from service.errors import NotFound, RequestError
from service.inputs import Input, check_count, parse_picture, parse_text
from service.registry import ServedModel
from service.replies import values_of, written
from service.routes.state import ServedRegistry
from service.schemas import Objects

router = APIRouter(tags=["compatibility"])

_KEPT = ("id", "text", "uri", "tags", "mime_type")
"""of a match, beside its scores; the picture itself is not sent back"""


class PostRequest(Lenient):
    """Documents, and what to do with them."""

    data: Annotated[Objects[dict[str, Any]], Field(min_length=1)]
    """each with text, blob (base64) or uri (a data URI), and for /rank with matches, the same"""
    exec_endpoint: Annotated[
        str | None, Field(validation_alias=AliasChoices("execEndpoint", "exec_endpoint"))
    ] = None
    """/, /encode, /rank, and either with /MODEL behind it"""
    header: dict[str, Any] = {}
    parameters: dict[str, Any] | None = None
    """model_name"""


@router.post("/post", openapi_extra=docs(PostRequest))
async def post(request: Request, registry: ServedRegistry) -> Response:
    """Embeddings of documents, or their matches with `clip_score`, best first."""
    body = await read_json(request, PostRequest)
    endpoint, model_name = _endpoint(body)
    served = registry.model(model_name)
    is_rank = endpoint == "rank"
    flat = list(_flatten(body.data, is_rank))
    check_count(len(flat), registry.settings.max_items, "data")
    max_chars = registry.settings.max_text_chars
    parsed = [_parse(document, place, max_chars) for document, place in flat]
    inputs, places = zip(*parsed, strict=True)
    answer = await embed(registry, served, inputs, places)
    rows, cut = answer.rows(), cut_places(answer.truncated, places)

    def write() -> Response:
        request_id = body.header.get("request_id") or uuid.uuid4().hex
        content = {
            "header": {"requestId": request_id, "status": None},
            "parameters": {},
            "routes": [],
            "data": list(_answers(served, body.data, rows, is_rank)),
        }
        # jina's client refuses a field it does not know.
        return reply_bare(content, served, cut)

    size = rows.size + is_rank * values_of(len(await request.body()))  # which is sent back in part
    return await written(registry.pool, size, write)


def _endpoint(body: PostRequest) -> tuple[str, str | None]:
    """encode or rank, and the model's name."""
    header = body.header.get("exec_endpoint")
    asked = body.exec_endpoint or (header if isinstance(header, str) else "/")
    endpoint, _, name = asked.strip("/").partition("/")
    if endpoint not in ("", "encode", "rank"):
        raise NotFound(
            "no such endpoint; here are /encode and /rank, and POST /v1/search",
            param="execEndpoint",
        )
    given = (body.parameters or {}).get("model_name")
    return endpoint or "encode", name or (given if isinstance(given, str) and given else None)


def _flatten(
    documents: list[dict[str, Any]], is_rank: bool
) -> Iterator[tuple[dict[str, Any], str]]:
    """Every document to embed, and its place: each is followed by its matches when these count."""
    for index, document in enumerate(documents):
        yield document, f"data[{index}]"
        if not is_rank:
            continue
        matches = document.get("matches")
        if not isinstance(matches, list) or not matches:
            place = f"data[{index}].matches"
            raise RequestError(f"{place} must be a list of the documents to rank", param=place)
        for row, match in enumerate(matches):
            yield match, f"data[{index}].matches[{row}]"


def _parse(document: Any, place: str, max_chars: int) -> tuple[Input, str]:
    """What to embed and its place: a picture if there is one, for `text` may be its caption."""
    given = document if isinstance(document, dict) else {}
    for key in ("blob", "uri", "text"):
        value, own = given.get(key), f"{place}.{key}"
        if value and isinstance(value, str):
            is_text = key == "text"
            return parse_text(value, own, max_chars) if is_text else parse_picture(value, own), own
    raise RequestError(
        f"{place} needs a text, a blob (a picture in base64) or a uri (a data URI)", param=place
    )


def _answers(
    served: ServedModel, documents: list[dict[str, Any]], rows: np.ndarray, is_rank: bool
) -> Iterator[dict[str, Any]]:
    vectors = iter(rows)
    for document in documents:
        found: dict[str, Any] = {"id": document.get("id") or uuid.uuid4().hex}
        vector = next(vectors)
        if is_rank:
            matches = document["matches"]
            found["matches"] = _rank(served, vector, matches, [next(vectors) for _ in matches])
        else:
            found["embedding"] = vector
        yield found


def _rank(
    served: ServedModel, vector: np.ndarray, matches: list[dict[str, Any]], rows: list[np.ndarray]
) -> list[dict[str, Any]]:
    """The matches with their scores, best first: the cosine, and the model's probability."""
    labels = tuple(str(index) for index in range(len(matches)))
    head = head_from_prompts(served.model, labels, np.stack(rows))
    probabilities = head.probabilities(vector[None])[0]
    cosines = head.weights @ vector
    ranked = []
    for index in np.argsort(-cosines, kind="stable"):
        match = matches[index]
        scores = {
            "clip_score": {"value": probabilities[index]},
            "clip_score_cosine": {"value": cosines[index]},
        }
        kept = {key: match[key] for key in _KEPT if key in match}
        ranked.append(kept | {"scores": scores})
    return ranked
