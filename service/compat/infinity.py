"""Infinity's routes without /v1: /embeddings, /embeddings_image, /models. Its /rerank is rerank.py.

infinity (michaelfeil/infinity, 0.0.78) serves them at the root unless it is given a prefix, and so
do its clients ask: infinity_client, LangChain's InfinityEmbeddings.
"""

from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.bodies import read_json
from service.compat.vectors import Lenient, docs, embed, places_of
from service.inputs import parse_picture
from service.registry import Registry, ServedModel
from service.replies import reply, written
from service.routes.embeddings import embeddings
from service.routes.encodings import encode
from service.routes.state import ServedRegistry
from service.schemas import EmbeddingsRequest, Values, request_docs

router = APIRouter(tags=["compatibility"])


class EmbeddingsImageRequest(Lenient):
    """Pictures alone; the older of Infinity's two ways."""

    model: str | None = None
    input: str | Values[str]
    """base64 or data URIs"""
    encoding_format: Literal["float", "base64"] = "float"


router.add_api_route(
    "/embeddings",
    embeddings,
    methods=["POST"],
    openapi_extra=request_docs(EmbeddingsRequest, pictures=True),
)


@router.post("/embeddings_image", openapi_extra=docs(EmbeddingsImageRequest))
async def embeddings_image(request: Request, registry: ServedRegistry) -> Response:
    """Vectors of pictures, in OpenAI's shape."""
    body = await read_json(request, EmbeddingsImageRequest)
    served = registry.model(body.model)
    given = [body.input] if isinstance(body.input, str) else body.input
    places = places_of("input", len(given), registry.settings.max_items)
    pictures = [parse_picture(text, place) for text, place in zip(given, places, strict=True)]
    answer = await embed(registry, served, pictures, places)
    rows = answer.rows()

    def write() -> Response:
        content = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": value}
                for index, value in enumerate(encode(rows, body.encoding_format))
            ],
            "usage": {"prompt_tokens": 0, "total_tokens": 0},
        }
        return reply(content, served)

    return await written(registry.pool, rows.size, write)


@router.get("/models")
async def models(registry: ServedRegistry) -> Response:
    """The models as Infinity describes its own, with how much is waiting for each."""
    data = [_describe(served, registry) for served in registry.models.values()]
    return reply({"object": "list", "data": data})


def _describe(served: ServedModel, registry: Registry) -> dict[str, Any]:
    waiting = served.pipeline.batcher.open_items
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "infinity",  # the only owner that infinity_client accepts
        "backend": "torch",
        "capabilities": ["embed", "image_embed", "rerank"],
        "fingerprint": served.fingerprint,
        "stats": {
            "queue_fraction": waiting / registry.settings.max_queue_items,
            "queue_absolute": waiting,
            "results_pending": waiting,
            "batch_size": registry.settings.max_image_batch,
        },
    }
