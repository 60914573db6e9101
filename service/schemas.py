"""The bodies of requests, as pydantic models, and how they get into /openapi.json.

Routes read bodies themselves (`read_json`, `read_form`): a large one is parsed in the pool, off the
event loop, and a body is never repeated in an error. The string under a field is its documentation.
"""

import asyncio
from collections.abc import Collection
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.datastructures import FormData, UploadFile

from service.errors import InvalidBody, UnsupportedBody, invalid_body

K_MAX = 1000
_LARGE_BODY_BYTES = 64 * 2**10
_REFERENCE = "#/components/schemas/{model}"


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class EmbeddingsRequest(_Body):
    """OpenAI's shape, with pictures beside texts."""

    model_config = ConfigDict(extra="ignore")  # OpenAI's clients send fields of their own

    model: str | None = None
    """one of /v1/models; the first when left out"""
    input: Annotated[
        Any,
        Field(
            json_schema_extra={
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "array",
                        "items": {
                            "anyOf": [
                                {"type": "string"},
                                {"type": "object", "properties": {"text": {"type": "string"}}},
                                {"type": "object", "properties": {"image": {"type": "string"}}},
                            ]
                        },
                    },
                ]
            }
        ),
    ]
    """a string, or a list of strings, {"text": ...} and {"image": base64 or data URI}"""
    modality: Literal["text", "image"] = "text"
    """what plain strings are; an image is base64 or a data URI"""
    encoding_format: Literal["float", "base64"] = "float"
    """base64 holds little-endian float32"""
    dimensions: int | None = None
    """must be the model's own number, if given"""
    on_error: Literal["fail", "report"] = "fail"
    """fail: one bad item fails the request; report: the others are answered, `errors` names it"""


class ClassifyRequest(_Body):
    """Pictures and the labels to choose from."""

    model: str | None = None
    """one of /v1/models; the first when left out"""
    images: list[str]
    """base64 or data URIs"""
    labels: list[str]
    """class names"""
    templates: str | list[str] = "none"
    """the name of a template set, or templates that each hold {} for the label"""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """labels to return for each picture, most probable first; all when left out"""


class SearchRequest(_Body):
    """A query by exactly one of text, image and vector."""

    collection: str | None = None
    """one of /v1/collections; may be left out when there is one"""
    text: str | None = None
    image: str | None = None
    """base64 or a data URI"""
    vector: list[float] | None = None
    """of the collection's dimension; need not be of unit length"""
    k: Annotated[int, Field(ge=1, le=K_MAX)] = 10
    """hits to return"""


class UpsertItem(_Body):
    """One item, its vector made from exactly one of image, text and vector."""

    id: str
    """1 to 512 bytes; an item of that id is replaced"""
    image: str | None = None
    """base64 or a data URI; a small copy is kept for display"""
    text: str | None = None
    vector: list[float] | None = None
    """made by the collection's model; scaled to unit length"""
    caption: str = ""
    metadata: dict[str, Any] = {}


class UpsertRequest(_Body):
    """Items to add or replace: all of them, or none when one is wrong."""

    items: list[UpsertItem]


Kind = TypeVar("Kind", bound=BaseModel)

_BODIES: tuple[type[BaseModel], ...] = (
    EmbeddingsRequest,
    ClassifyRequest,
    SearchRequest,
    UpsertRequest,
)


async def read_json(request: Request, kind: type[Kind]) -> Kind:
    """The request's JSON body. Raises InvalidBody, which holds none of it."""
    content_type = _content_type(request)
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise UnsupportedBody("send JSON, with the header Content-Type: application/json")
    body = await request.body()
    try:
        if len(body) < _LARGE_BODY_BYTES:
            return kind.model_validate_json(body)
        loop = asyncio.get_running_loop()
        pool = request.app.state.registry.pool
        return await loop.run_in_executor(pool, kind.model_validate_json, body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        raise invalid_body(problems) from None


def is_form(request: Request) -> bool:
    """Whether the body is multipart/form-data."""
    return _content_type(request) == "multipart/form-data"


async def read_form(
    request: Request, fields: Collection[str], *, max_files: int, max_fields: int
) -> "Form":
    """The request's form, whose parts are called as `fields`; every file part is a picture."""
    async with request.form(max_files=max_files, max_fields=max_fields) as data:
        if unknown := [name for name in data if name not in fields]:
            raise InvalidBody(
                f"the form has {len(unknown)} parts this route does not know; it takes"
                f" {', '.join(fields)}"
            )
        return await Form.read(data)


class Form:
    """A form, read: its texts by name and its files in order."""

    def __init__(self, texts: dict[str, list[str]], files: list[bytes]) -> None:
        self._texts = texts
        self.files = files

    @classmethod
    async def read(cls, data: FormData) -> "Form":
        texts: dict[str, list[str]] = {}
        files = []
        for name, value in data.multi_items():
            if isinstance(value, UploadFile):
                files.append(await value.read())
            else:
                texts.setdefault(name, []).append(value)
        return cls(texts, files)

    def all(self, name: str) -> list[str]:
        """Every value of a field."""
        return self._texts.get(name, [])

    def one(self, name: str) -> str | None:
        """The last value of a field, None if it is missing or empty."""
        values = self.all(name)
        return values[-1] or None if values else None

    def number(self, name: str, low: int, high: int) -> int | None:
        """A whole number of a range, None if the field is missing or empty."""
        text = self.one(name)
        if text is None:
            return None
        if not (text.isascii() and text.isdigit() and len(text) < 10 and low <= int(text) <= high):
            raise InvalidBody(f"{name} must be a whole number from {low} to {high}", param=name)
        return int(text)


def request_docs(kind: type[BaseModel], form: dict[str, Any] | None = None) -> dict[str, Any]:
    """`openapi_extra` of a route that reads its own body; `form`: properties of its form."""
    content: dict[str, Any] = {
        "application/json": {"schema": {"$ref": _REFERENCE.format(model=kind.__name__)}}
    }
    if form is not None:
        content["multipart/form-data"] = {"schema": {"type": "object", "properties": form}}
    return {"requestBody": {"required": True, "content": content}}


def body_schemas() -> dict[str, Any]:
    """The components that `request_docs` refers to."""
    pairs: list[tuple[type[BaseModel], Literal["validation"]]] = [
        (body, "validation") for body in _BODIES
    ]
    _, schema = models_json_schema(pairs, ref_template=_REFERENCE)
    definitions: dict[str, Any] = schema["$defs"]
    return definitions


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()
