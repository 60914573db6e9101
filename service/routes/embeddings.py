"""POST /v1/embeddings: OpenAI's shape, for texts and pictures."""

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from service.errors import RequestError, at, error_fields
from service.inputs import Input, check_count, parse_input
from service.pipeline import Embedded
from service.registry import ServedModel
from service.replies import reply
from service.routes.state import ServedRegistry
from service.schemas import EmbeddingsRequest, read_json, request_docs

router = APIRouter(tags=["embeddings"])


@router.post("/v1/embeddings", openapi_extra=request_docs(EmbeddingsRequest))
async def embeddings(request: Request, registry: ServedRegistry) -> Response:
    """Unit vectors of texts and pictures.

    `usage` counts text tokens, start and end included; `truncated` on an item says that the text
    did not fit into the model's context.
    """
    body = await read_json(request, EmbeddingsRequest)
    served = registry.model(body.model)
    _check_dimensions(body.dimensions, served)
    inputs = _parse(body, registry.settings.max_items)
    answer = await served.pipeline.embed(inputs)
    errors = _errors(answer)
    if errors and (body.on_error == "fail" or len(errors) == len(inputs)):
        index, error = errors[0]
        raise at(error, _place(body, index))
    num_tokens = sum(answer.num_tokens)
    content: dict[str, Any] = {
        "object": "list",
        "data": _data(answer, body.encoding_format),
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    if body.on_error == "report":
        content["errors"] = [
            {"index": index, "error": error_fields(error, _place(body, index))}
            for index, error in errors
        ]
    return reply(content, served)


def _parse(body: EmbeddingsRequest, max_items: int) -> list[Input]:
    images = body.modality == "image"
    if not isinstance(body.input, list):
        return [parse_input(body.input, "input", images=images)]
    check_count(len(body.input), max_items, "input")
    return [
        parse_input(value, f"input[{index}]", images=images)
        for index, value in enumerate(body.input)
    ]


def _place(body: EmbeddingsRequest, index: int) -> str:
    return f"input[{index}]" if isinstance(body.input, list) else "input"


def _check_dimensions(dimensions: int | None, served: ServedModel) -> None:
    embed_dim = served.model.embed_dim
    if dimensions not in (None, embed_dim):
        raise RequestError(
            f"this model makes vectors of {embed_dim} dimensions and cannot shorten them; leave"
            f" dimensions out, or give {embed_dim}",
            param="dimensions",
        )


def _errors(answer: Embedded) -> list[tuple[int, Exception]]:
    pairs = enumerate(answer.vectors)
    return [(index, vector) for index, vector in pairs if isinstance(vector, Exception)]


def _data(answer: Embedded, encoding: str) -> list[dict[str, Any]]:
    return [
        {
            "object": "embedding",
            "index": index,
            "embedding": _encode(vector, encoding),
            "truncated": answer.truncated[index],
        }
        for index, vector in enumerate(answer.vectors)
        if not isinstance(vector, Exception)
    ]


def _encode(vector: np.ndarray, encoding: str) -> np.ndarray | str:
    if encoding == "float":
        return np.ascontiguousarray(vector)
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
