"""What a client is told when something is wrong: one table, one body.

Routes raise; nobody builds error replies but `error_response`. The body is always
{"error": {"message", "type", "param", "code"}}, the code once more in the header X-Clipserve-Error,
for logs and metrics. A message never repeats the request's content, but for the few characters that
a filter's error points at, and never holds a path of this machine: what might is logged here and
replaced.
"""

import errno
import logging
from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from clipserve.errors import (
    CheckpointError,
    ClipserveError,
    CollectionClosed,
    DiskFull,
    FilterError,
    ImageError,
    IndexStoreError,
    TextError,
)

logger = logging.getLogger(__name__)

ERROR_HEADER = "x-clipserve-error"


class RequestError(ClipserveError):
    """A request that cannot be answered; the message is written for the client."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.headers: dict[str, str] = {}


class Unauthorized(RequestError):
    """A request without a key that is known here."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.headers = {"WWW-Authenticate": "Bearer"}


class NotFound(RequestError):
    """A model, collection or item that is not here."""


class Forbidden(RequestError):
    """What the settings, or the scope of the key, do not allow."""


class HeadersTooLarge(RequestError):
    """More header lines, or longer ones, than allowed."""


class SlowBody(RequestError):
    """A body that did not arrive in time."""


class BodyTooLarge(RequestError):
    """A body over the limit."""


class UnsupportedBody(RequestError):
    """A body of a content type no route reads."""


class InvalidBody(RequestError):
    """JSON that does not fit the route's schema."""


class Overloaded(RequestError):
    """More work is waiting than allowed; tells when to come back."""

    def __init__(self, message: str, retry_after_s: int = 1, *, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.headers = {"Retry-After": str(retry_after_s)}


class ModelFailed(RequestError):
    """The model raised, or gave something that is not a vector."""


class NotReady(RequestError):
    """The service cannot answer now."""


class CollectionUnavailable(NotReady):
    """A collection that is here, but is not served."""


class RequestTimeout(RequestError):
    """The answer took too long."""


_TABLE: dict[type[Exception], tuple[int, str, str]] = {
    RequestError: (400, "invalid_request_error", "invalid_request"),
    FilterError: (400, "invalid_request_error", "invalid_filter"),
    Unauthorized: (401, "authentication_error", "invalid_api_key"),
    NotFound: (404, "invalid_request_error", "not_found"),
    CollectionClosed: (404, "invalid_request_error", "collection_not_found"),
    Forbidden: (403, "permission_error", "forbidden"),
    SlowBody: (408, "invalid_request_error", "body_timeout"),
    BodyTooLarge: (413, "invalid_request_error", "body_too_large"),
    UnsupportedBody: (415, "invalid_request_error", "unsupported_content_type"),
    InvalidBody: (422, "invalid_request_error", "invalid_body"),
    CheckpointError: (422, "invalid_request_error", "invalid_checkpoint"),
    ImageError: (422, "invalid_request_error", "invalid_image"),
    TextError: (422, "invalid_request_error", "invalid_text"),
    Overloaded: (429, "overloaded_error", "overloaded"),
    HeadersTooLarge: (431, "invalid_request_error", "headers_too_large"),
    ModelFailed: (500, "server_error", "model_failed"),
    NotReady: (503, "server_error", "not_ready"),
    CollectionUnavailable: (503, "server_error", "collection_unavailable"),
    RequestTimeout: (504, "server_error", "timeout"),
    DiskFull: (507, "server_error", "disk_full"),
    IndexStoreError: (500, "server_error", "collection_failed"),
    Exception: (500, "server_error", "internal_error"),
}
_SAFE = (RequestError, FilterError, ImageError, TextError)
_UNION_MEMBERS = ("str", "list[str]")
"""what pydantic adds to a place for each type that a field may have"""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


def error_fields(error: Exception, param: str | None = None) -> dict[str, Any]:
    """The four fields of an error, for a body of its own or beside the answers of other items."""
    _, kind, code = _row(error)
    if isinstance(error, RequestError):
        code, param = error.code or code, error.param or param
    return {"message": _message(error), "type": kind, "param": param, "code": code}


def error_response(error: Exception, param: str | None = None) -> Response:
    """The reply for an error, by the table."""
    headers = error.headers if isinstance(error, RequestError) else None
    return _reply(_row(error)[0], error_fields(error, param), headers)


def is_disk_full(error: Exception) -> bool:
    return isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in _FULL)


def at(error: Exception, param: str) -> Exception:
    """The error, saying which part of the request it is about."""
    if isinstance(error, RequestError):
        error.param = error.param or param
        return error
    if isinstance(error, ImageError | TextError):
        return InvalidBody(f"{param}: {error}", param=param, code=_row(error)[2])
    return error


def invalid_body(errors: Sequence[Any]) -> RequestError:
    """From pydantic's list of errors, without the values it holds."""
    first = errors[0]
    loc, message = first["loc"], first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return RequestError(message, code="invalid_json")
    if first["type"] == "extra_forbidden":
        # The name of an unknown field is the client's text: where it is tells enough.
        place = _place(loc[:-1])
        what = f"{place or 'the body'} has a field this route does not know; see /docs"
        return InvalidBody(what, param=place or None)
    place = _place(loc)
    return InvalidBody(f"{place}: {message}" if place else message, param=place or None)


def install_handlers(app: FastAPI) -> None:
    """Make every error of the app, Starlette's own too, one of ours."""
    app.add_exception_handler(ClipserveError, _answer)
    app.add_exception_handler(OSError, _answer)  # which Starlette would log and raise once more
    app.add_exception_handler(Exception, _answer)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_validation)


def _place(loc: Sequence[str | int]) -> str:
    """`items[3].metadata`, as the routes themselves name what they check."""
    parts = [part for part in loc if part != "body" and part not in _UNION_MEMBERS]
    named = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return "".join(named).removeprefix(".")


async def _answer(request: Request, error: Exception) -> Response:
    return error_response(error)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404:
        message = "no such route; GET /docs lists them"
    elif error.status_code == 405:
        message = "this route does not take that method; GET /docs lists them"
    code = _CODES.get(error.status_code, "invalid_request")
    fields = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return _reply(error.status_code, fields, error.headers)


async def _answer_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(invalid_body(error.errors()))


def _row(error: Exception) -> tuple[int, str, str]:
    return next(_TABLE[kind] for kind in _kind(error).__mro__ if kind in _TABLE)


def _kind(error: Exception) -> type[Exception]:
    return DiskFull if is_disk_full(error) else type(error)


def _message(error: Exception) -> str:
    if isinstance(error, _SAFE):
        return str(error)
    if isinstance(error, CollectionClosed):
        return "the collection was dropped"
    if is_disk_full(error):
        logger.error("a request failed: %s", error)
        return "the service's disk is full: make room, then repeat what was not acknowledged"
    logger.error("a request failed: %s", error, exc_info=error)
    if isinstance(error, CheckpointError):
        return "the model could not be loaded, the old one stays; the server's log says why"
    if isinstance(error, IndexStoreError):
        return "the collection could not be read or written; the server's log says why"
    return "internal error; the server's log says why"


def _reply(status: int, fields: dict[str, Any], headers: Any = None) -> Response:
    body = orjson.dumps({"error": fields})
    headers = {**(headers or {}), ERROR_HEADER: fields["code"]}
    return Response(body, status, headers, media_type="application/json")
