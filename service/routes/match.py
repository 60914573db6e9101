"""POST /v1/match: whether pictures and texts belong together, read jointly (ALBEF)."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.bodies import read
from service.errors import RequestError, at, error_fields
from service.inputs import Input, Picture, check_count, fetched, parse_picture, parse_text
from service.pipeline import Matched
from service.replies import reply
from service.routes.state import ServedRegistry
from service.schemas import MatchRequest, request_docs

router = APIRouter(tags=["match"])


@router.post("/v1/match", openapi_extra=request_docs(MatchRequest, pictures=True))
async def match(request: Request, registry: ServedRegistry) -> Response:
    """The probability that picture and text belong together, of each pair.

    Picture i goes with text i; a single picture with each of the texts, a single text with each of
    the pictures. Only models trained to match can do it. A pair that cannot be read has an `error`;
    `truncated` says that a text did not fit into the model's context.
    """
    settings = registry.settings
    body, files = await read(request, MatchRequest, max_files=settings.max_items)
    served = registry.model(body.model)
    images: list[Input] = [Picture(file) for file in files]
    images += [parse_picture(one, f"images[{i}]") for i, one in enumerate(body.images or [])]
    limit = settings.max_text_chars
    texts = [parse_text(one, f"texts[{i}]", limit) for i, one in enumerate(body.texts or [])]
    pairs = _pairs(len(images), len(texts), settings.max_items)
    images = await fetched(images, registry.fetcher)
    found = await served.match([images[i] for i, _ in pairs], [texts[j] for _, j in pairs])
    failed = [one for one in found.probabilities if isinstance(one, Exception)]
    if len(failed) == len(pairs):
        raise at(failed[0], "images[0]")
    return reply({"object": "list", "results": _results(pairs, found)}, served)


def _pairs(num_images: int, num_texts: int, limit: int) -> list[tuple[int, int]]:
    """Places of pictures and texts."""
    check_count(num_images, limit, "images")
    check_count(num_texts, limit, "texts")
    if num_images != num_texts and 1 not in (num_images, num_texts):
        raise RequestError(
            f"{num_images} images and {num_texts} texts make no pairs; send as many of both, or one"
            " of either",
            param="texts",
        )
    count = max(num_images, num_texts)
    return [(min(i, num_images - 1), min(i, num_texts - 1)) for i in range(count)]


def _results(pairs: Sequence[tuple[int, int]], found: Matched) -> list[dict[str, Any]]:
    return [
        {"image": i, "text": j, "error": error_fields(one, f"images[{i}]")}
        if isinstance(one, Exception)
        else {"image": i, "text": j, "probability": one, "truncated": is_cut}
        for (i, j), one, is_cut in zip(pairs, found.probabilities, found.truncated, strict=True)
    ]
