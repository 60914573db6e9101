"""text-embeddings-inference's /embed and /info (huggingface, 1.9). Its /rerank is rerank.py."""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from clipserve import __version__
from clipserve.embed import precision
from service.bodies import read_json
from service.compat.vectors import (
    Lenient,
    check_whole,
    cut_places,
    docs,
    embed,
    places_of,
    reply_bare,
)
from service.errors import RequestError
from service.inputs import parse_input
from service.replies import reply, written
from service.routes.encodings import encode
from service.routes.state import ServedRegistry

router = APIRouter(tags=["compatibility"])

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}


class EmbedRequest(Lenient):
    """Texts; pictures as {"image": ...} too, which TEI has not."""

    inputs: Annotated[Any, Field(json_schema_extra={"type": ["string", "array"]})]
    model: str | None = None
    normalize: bool = True
    truncate: bool = True
    """false: a text that does not fit into the model's context is an error"""
    dimensions: int | None = None
    """must be the model's own number, if given"""


@router.post("/embed", openapi_extra=docs(EmbedRequest))
async def embed_texts(request: Request, registry: ServedRegistry) -> Response:
    """A bare list of unit vectors."""
    body = await read_json(request, EmbedRequest)
    served = registry.model(body.model)
    served.check_dimensions(body.dimensions, "dimensions")
    if not body.normalize:
        raise RequestError(
            "vectors are of unit length here; leave normalize out", param="normalize"
        )
    settings = registry.settings
    given = body.inputs if isinstance(body.inputs, list) else [body.inputs]
    places = places_of("inputs", len(given), settings.max_items)
    inputs = [
        parse_input(value, place, max_chars=settings.max_text_chars)
        for value, place in zip(given, places, strict=True)
    ]
    answer = await embed(registry, served, inputs, places)
    if not body.truncate:
        check_whole(answer, places)
    rows, cut = answer.rows(), cut_places(answer.truncated, places)
    return await written(
        registry.pool, rows.size, lambda: reply_bare(encode(rows, "float"), served, cut)
    )


@router.get("/info")
async def info(registry: ServedRegistry) -> Response:
    """The default model and the limits, as TEI names them."""
    served = registry.model(None)
    content = {
        "model_id": served.name,
        "model_sha": served.fingerprint,
        "model_dtype": _DTYPES[precision(served.model)],
        "model_type": {"embedding": {"pooling": "cls"}},
        "max_input_length": served.model.context_length,
        "max_client_batch_size": registry.settings.max_items,
        "max_concurrent_requests": registry.settings.max_requests,
        "version": __version__,
    }
    return reply(content, served)
