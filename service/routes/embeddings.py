"""POST /v1/embeddings: OpenAI's shape, for texts and pictures; or the rows alone, as bytes."""

from collections.abc import Sequence
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
from service.routes.encodings import encode
from service.routes.state import ServedRegistry
from service.schemas import EmbeddingsRequest, RowEncoding, request_docs

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
    served.check_dimensions(body.dimensions, "dimensions")
    if not body.normalized:
        raise RequestError(
            "vectors are of unit length here; leave normalized out", param="normalized"
        )
    values = _values(body, len(files))
    check_count(len(values) + len(files), max_items, "input")
    places = _places(body, len(values), len(files))
    inputs = await fetched(_parse(body, values, files, places, registry), registry.fetcher)
    answer = await served.pipeline.embed(inputs, priority=body.priority)
    if not body.truncate:
        _refuse_truncated(answer, places)
    errors = _errors(answer)
    if errors and (body.on_error == "fail" or len(errors) == len(inputs)):
        index, error = errors[0]
        raise at(error, places[index])
    rows_type = wanted_type(request, (OCTETS, NPY))
    if rows_type is not None:
        return _rows(answer, rows_type, served)
    size = len(inputs) * served.model.embed_dim
    return await written(registry.pool, size, lambda: _reply(answer, body, places, served))


def part_of(message: Any, place: str) -> tuple[Any, bool]:
    """The text or picture of a chat's message, and whether it is a picture."""
    match message:
        case {"content": str(text)} | {"content": [{"type": "text", "text": text}]}:
            return text, False
        case {"content": [{"type": "image_url", "image_url": {"url": url}}]}:
            return url, True
    raise RequestError(
        f'{place} must be {{"content": [part]}} with one part, a text or an image_url; this model'
        " does not read several as one",
        param=place,
    )


def _values(body: EmbeddingsRequest, num_files: int) -> list[Any]:
    """What is to be embedded, beside the files."""
    if body.messages is not None:
        if body.input is not None or num_files or len(body.messages) != 1:
            raise RequestError(
                "messages is one message with one text or picture, in the place of input and files;"
                " send a request for each",
                param="messages",
            )
        value, is_image = part_of(body.messages[0], "messages[0]")
        return [{"image" if is_image else "text": value}]
    if body.input is None:
        if not num_files:
            raise InvalidBody("input: Field required", param="input")
        return []
    return body.input if isinstance(body.input, list) else [body.input]


def _places(body: EmbeddingsRequest, num_values: int, num_files: int) -> list[str]:
    """What the inputs are called in an error."""
    if body.messages is not None:
        return ["messages[0]"]
    given = [f"input[{i}]" for i in range(num_values)]
    if not isinstance(body.input, list):
        given = ["input"] * num_values
    return given + [f"files[{i}]" for i in range(num_files)]


def _parse(
    body: EmbeddingsRequest,
    values: Sequence[Any],
    files: Sequence[bytes],
    places: Sequence[str],
    registry: Registry,
) -> list[Input]:
    limit, images = registry.settings.max_text_chars, body.modality == "image"
    parsed = [
        parse_input(value, place, images=images, max_chars=limit)
        for value, place in zip(values, places, strict=False)
    ]
    return [*parsed, *(Picture(file) for file in files)]


def _refuse_truncated(answer: Embedded, places: Sequence[str]) -> None:
    """In the place of the vectors of texts that did not fit."""
    for index, (is_cut, place) in enumerate(zip(answer.truncated, places, strict=True)):
        if is_cut:
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
        "X-Clipserve-Errors": _listed([index for index, _ in _errors(answer)]),
        "X-Clipserve-Truncated": _listed(list(np.flatnonzero(answer.truncated))),
        "X-Clipserve-Tokens": str(sum(answer.num_tokens)),
    }
    return reply_rows(np.stack(rows), media_type, served, headers)


def _listed(indices: list[int]) -> str:
    return ",".join(map(str, indices[:_PLACES_IN_A_HEADER]))


def _reply(
    answer: Embedded, body: EmbeddingsRequest, places: Sequence[str], served: ServedModel
) -> Response:
    num_tokens = sum(answer.num_tokens)
    content: dict[str, Any] = {
        "object": "list",
        "data": _data(answer, body.embedding_type or body.encoding_format),
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    if body.on_error == "report":
        content["errors"] = [
            {"index": index, "error": error_fields(error, places[index])}
            for index, error in _errors(answer)
        ]
    return reply(content, served)


def _data(answer: Embedded, encoding: RowEncoding) -> list[dict[str, Any]]:
    return [
        {
            "object": "embedding",
            "index": index,
            "embedding": encode(vector[np.newaxis], encoding)[0],
            "truncated": answer.truncated[index],
            "num_tokens": answer.num_tokens[index],
        }
        for index, vector in enumerate(answer.vectors)
        if not isinstance(vector, Exception)
    ]
