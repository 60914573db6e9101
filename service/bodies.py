"""How requests are read: JSON, a form, or a picture as the whole body.

Routes read bodies themselves: a large one is parsed in the pool, off the event loop, and a body is
never repeated in an error. A small one cannot cost much more memory than its bytes: what makes many
objects of few bytes is counted first, and bounded. Start at `read`.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import from_json

from service.errors import InvalidBody, RequestError, UnsupportedBody, invalid_body
from service.forms import parse_form
from service.schemas import Given, Values

T = TypeVar("T")
Kind = TypeVar("Kind", bound=BaseModel)

_LARGE_BODY_BYTES = 64 * 2**10
_MAX_BRACKETS = 200_000
"""[ and { in a body: lists and objects, of which an empty one is 2 bytes there and 64 here"""
_MAX_VALUES = 1_000_000
"""commas in a body: numbers, texts and fields, which make up to twenty times their bytes"""
_MAX_LINE_VALUES = 100_000
"""the same in a line"""
_FILE_PARTS = ("file", "files")


async def read(
    request: Request, kind: type[Kind], *, max_files: int, max_fields: int = 100
) -> tuple[Kind, list[bytes]]:
    """The request's body, and the pictures that were sent as bytes.

    Beside a picture as the whole body the other values are in the query; in a form they are fields.
    """
    sent_as = content_type(request)
    if sent_as == "multipart/form-data":
        return await _read_form(request, kind, max_files, max_fields)
    if sent_as.startswith("image/"):
        return from_texts(kind, request.query_params.multi_items()), [await request.body()]
    return await read_json(request, kind), []


async def read_json(request: Request, kind: type[Kind], *, optional: bool = False) -> Kind:
    """The request's JSON body; `optional` allows none at all. Raises InvalidBody."""
    body = await request.body()
    if optional and not body:
        return kind()
    sent_as = content_type(request)
    if sent_as != "application/json" and not sent_as.endswith("+json"):
        raise UnsupportedBody("send JSON, with the header Content-Type: application/json")
    return await parse_json(request, kind, body)


async def parse_json(request: Request, kind: type[Kind], body: bytes) -> Kind:
    """A body from JSON, a large one in the pool, its error too. Raises InvalidBody."""
    return await _parsed(request, body, lambda: _parse_json(kind, body))


def parse_line(kind: type[Kind], line: bytes, max_bytes: int) -> Kind:
    """One item of NDJSON, which costs little more than its bytes. Raises InvalidBody."""
    if len(line) > max_bytes:
        raise InvalidBody(
            f"the line has {len(line)} bytes; at most {max_bytes} are read", code="line_too_long"
        )
    if line.count(b",") > _MAX_LINE_VALUES:
        raise InvalidBody(f"the line has more than {_MAX_LINE_VALUES} values")
    return _parse_json(kind, line)


def _parse_json(kind: type[Kind], body: bytes) -> Kind:
    if body.count(b"[") + body.count(b"{") > _MAX_BRACKETS:
        raise InvalidBody(
            f"there are more than {_MAX_BRACKETS} lists and objects; send less at once",
            code="too_many_items",
        )
    if body.count(b",") > _MAX_VALUES:
        raise InvalidBody(
            f"there are more than {_MAX_VALUES} values; send less at once",
            code="too_many_items",
        )
    try:
        # Not by pydantic's own parser, which first makes a tree of many times the size.
        value = from_json(body)
    except ValueError as error:
        raise RequestError(f"Invalid JSON: {error}", code="invalid_json") from None
    return _validate(kind, value)


def _validate(kind: type[Kind], value: Any) -> Kind:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _invalid(error) from None


def from_texts(kind: type[Kind], pairs: Iterable[tuple[str, str]]) -> Kind:
    """A body from names and texts, as a form or a query has them; empty ones are left out."""
    texts: dict[str, list[str]] = {}
    for name, text in pairs:
        if text:
            texts.setdefault(name, []).append(text)
    fields = kind.model_fields
    given = {
        name: _value(fields[name], name, values) if name in fields else values[-1]
        for name, values in texts.items()
    }
    return _validate(kind, given)


def content_type(request: Request) -> str:
    """In lower case, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _read_form(
    request: Request, kind: type[Kind], max_files: int, max_fields: int
) -> tuple[Kind, list[bytes]]:
    body = await request.body()
    sent_as = request.headers["content-type"]

    def parse() -> tuple[Kind, list[bytes]]:
        form = parse_form(sent_as, body, max_files=max_files, max_fields=max_fields)
        if any(name not in _FILE_PARTS for name, _ in form.files):
            raise InvalidBody("a file part of the form is not called file or files; see /docs")
        return from_texts(kind, form.fields), [content for _, content in form.files]

    return await _parsed(request, body, parse)


async def _parsed(request: Request, body: bytes, parse: Callable[[], T]) -> T:
    """What `parse` makes of a body; of a large one in the pool."""
    if len(body) < _LARGE_BODY_BYTES:
        return parse()
    pool = request.app.state.registry.pool
    return await asyncio.get_running_loop().run_in_executor(pool, parse)


def _value(field: FieldInfo, name: str, values: list[str]) -> Any:
    """What pydantic is given for a field, of the texts that came under its name."""
    form = next((mark.form for mark in field.metadata if isinstance(mark, Given)), None)
    if form == "json":
        try:
            return orjson.loads(values[-1])
        except orjson.JSONDecodeError:
            raise InvalidBody(f"{name} is not JSON", param=name) from None
    if form == "commas":
        return values if len(values) > 1 else values[0].split(",")
    if form == "one or several":
        return values if len(values) > 1 or _is_list(field) else values[0]
    return values[-1]


def _is_list(field: FieldInfo) -> bool:
    """Whether one value is a list of it as well."""
    return field.annotation == Values[str] | None


def _invalid(error: ValidationError) -> RequestError:
    return invalid_body(error.errors(include_url=False, include_context=False, include_input=False))
