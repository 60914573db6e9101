"""POST /v1/embeddings: OpenAI's shape, for texts and pictures; or the rows alone, as bytes."""

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from service.bodies import read
from service.errors import InvalidBody, RequestError, at, error_fields
from service.inputs import Input, Picture, check_count, fetched, parse_input
from service.pipeline import Embedded
from service.registry import Registry, ServedModel
from service.replies import NPY, OCTETS, reply, reply_rows, wanted_type, written
from service.routes.state import ServedRegistry
from service.schemas import EmbeddingsRequest, request_docs

router = APIRouter(tags=["embeddings"])

_PLACES_IN_A_HEADER = 1000


@router.post("/v1/embeddings", openapi_extra=request_docs(EmbeddingsRequest, pictures=True))
async def embeddings(request: Request, registry: ServedRegistry) -> Response:
    """Unit vectors of texts and pictures.

    `usage` counts text tokens, start and end included; `truncated` on an item says that the text
    did not fit into the model's context. A picture may be the whole body, or several the files of a
    form. With `Accept: application/octet-stream` the answer is the rows as little-endian float32,
    with `Accept: application/x-npy` a .npy file of them.
    """
    max_items = registry.settings.max_items
    body, files = await read(request, EmbeddingsRequest, max_files=max_items)
    served = registry.model(body.model)
    _check_dimensions(body.dimensions, served)
    inputs = await fetched(_parse(body, files, registry), registry.fetcher)
    answer = await served.pipeline.embed(inputs, priority=body.priority)
    if not body.truncate:
        _refuse_truncated(answer, body)
    errors = _errors(answer)
    if errors and (body.on_error == "fail" or len(errors) == len(inputs)):
        index, error = errors[0]
        raise at(error, _place(body, index))
    rows_type = wanted_type(request, (OCTETS, NPY))
    if rows_type is not None:
        return _rows(answer, rows_type, served)
    size = len(inputs) * served.model.embed_dim
    return await written(registry.pool, size, lambda: _reply(answer, body, served))


def _parse(body: EmbeddingsRequest, files: list[bytes], registry: Registry) -> list[Input]:
    settings, images = registry.settings, body.modality == "image"
    values = body.input if isinstance(body.input, list) else [body.input]
    if body.input is None:
        if not files:
            raise InvalidBody("input: Field required", param="input")
        values = []
    check_count(len(values) + len(files), settings.max_items, "input")
    parsed = [
        parse_input(value, _place(body, index), images=images, max_chars=settings.max_text_chars)
        for index, value in enumerate(values)
    ]
    return [*parsed, *(Picture(file) for file in files)]


def _place(body: EmbeddingsRequest, index: int) -> str:
    """What an input is called in an error; files come after what is in `input`."""
    given = body.input if isinstance(body.input, list) else [body.input] * (body.input is not None)
    if index >= len(given):
        return f"files[{index - len(given)}]"
    return f"input[{index}]" if isinstance(body.input, list) else "input"


def _check_dimensions(dimensions: int | None, served: ServedModel) -> None:
    embed_dim = served.model.embed_dim
    if dimensions not in (None, embed_dim):
        raise RequestError(
            f"this model makes vectors of {embed_dim} dimensions and cannot shorten them; leave"
            f" dimensions out, or give {embed_dim}",
            param="dimensions",
        )


def _refuse_truncated(answer: Embedded, body: EmbeddingsRequest) -> None:
    """In the place of the vectors of texts that did not fit."""
    for index, is_cut in enumerate(answer.truncated):
        if is_cut:
            place = _place(body, index)
            answer.vectors[index] = RequestError(
                f"{place} does not fit into the model's context; shorten it, or leave truncate out",
                param=place,
                code="text_too_long",
            )


def _errors(answer: Embedded) -> list[tuple[int, Exception]]:
    pairs = enumerate(answer.vectors)
    return [(index, vector) for index, vector in pairs if isinstance(vector, Exception)]


def _rows(answer: Embedded, media_type: str, served: ServedModel) -> Response:
    """What a vector could not be made of has a row of NaN, and is named in a header."""
    nothing = np.full(served.model.embed_dim, np.nan, np.float32)
    rows = [nothing if isinstance(v, Exception) else v for v in answer.vectors]
    headers = {
        "X-Clipserve-Errors": _places([index for index, _ in _errors(answer)]),
        "X-Clipserve-Truncated": _places(list(np.flatnonzero(answer.truncated))),
        "X-Clipserve-Tokens": str(sum(answer.num_tokens)),
    }
    return reply_rows(np.stack(rows), media_type, served, headers)


def _places(indices: list[int]) -> str:
    return ",".join(map(str, indices[:_PLACES_IN_A_HEADER]))


def _reply(answer: Embedded, body: EmbeddingsRequest, served: ServedModel) -> Response:
    num_tokens = sum(answer.num_tokens)
    content: dict[str, Any] = {
        "object": "list",
        "data": _data(answer, body.encoding_format),
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    if body.on_error == "report":
        content["errors"] = [
            {"index": index, "error": error_fields(error, _place(body, index))}
            for index, error in _errors(answer)
        ]
    return reply(content, served)


def _data(answer: Embedded, encoding: str) -> list[dict[str, Any]]:
    return [
        {
            "object": "embedding",
            "index": index,
            "embedding": _encode(vector, encoding),
            "truncated": answer.truncated[index],
            "num_tokens": answer.num_tokens[index],
        }
        for index, vector in enumerate(answer.vectors)
        if not isinstance(vector, Exception)
    ]


def _encode(vector: np.ndarray, encoding: str) -> np.ndarray | str:
    if encoding == "float":
        return np.ascontiguousarray(vector)
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
