"""What the adapters share: clients' inputs -> unit vectors, and what is checked on the way."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from service.errors import RequestError, at
from service.inputs import Input, check_count, fetched
from service.pipeline import Embedded
from service.registry import Registry, ServedModel
from service.replies import model_headers, to_json
from service.schemas import Body

_PLACES_IN_A_HEADER = 100


class Lenient(Body):
    """A body of which the fields that mean nothing here are passed over: clients send many."""

    model_config = ConfigDict(extra="ignore")


async def embed(
    registry: Registry, served: ServedModel, inputs: Sequence[Input], places: Sequence[str]
) -> Embedded:
    """Vectors of all inputs; the first that fails raises, naming its place in the request."""
    answer = await served.pipeline.embed(await fetched(inputs, registry.fetcher))
    for vector, place in zip(answer.vectors, places, strict=True):
        if isinstance(vector, Exception):
            raise at(vector, place)
    return answer


def places_of(param: str, count: int, limit: int) -> list[str]:
    """`param[0]`, `param[1]`, ...; RequestError for none or more than the limit."""
    check_count(count, limit, param)
    return [f"{param}[{index}]" for index in range(count)]


def check_whole(answer: Embedded, places: Sequence[str]) -> None:
    """RequestError if a text did not fit into the model's context."""
    for place, truncated in zip(places, answer.truncated, strict=True):
        if truncated:
            raise RequestError(
                f"{place} does not fit into the model's context; shorten it, or allow truncation",
                param=place,
                code="text_too_long",
            )


def cut_places(truncated: Sequence[bool], places: Sequence[str]) -> list[str]:
    """The places in the request of the texts that did not fit into the model's context."""
    return [place for place, is_cut in zip(places, truncated, strict=True) if is_cut]


def reply_bare(content: Any, served: ServedModel, truncated: Sequence[str] = ()) -> Response:
    """For clients that bear no more fields than they know; what made it, and the places of texts
    that were cut, are in the headers."""
    headers = model_headers(served)
    if truncated:
        headers["X-Clipserve-Truncated"] = ",".join(truncated[:_PLACES_IN_A_HEADER])
    return Response(to_json(content), headers=headers, media_type="application/json")


def docs(body: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads this body itself."""
    schema = body.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
