"""One line for every request, an id that finds it again, and logs as text or JSON.

`ObserveRequests` is the outermost middleware: whatever becomes of a request, it is answered,
counted and logged once, by its route's template, its status and the name of its key, never by what
it held.
"""

import contextlib
import json
import logging
import re
import time
import uuid
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ERROR_HEADER, error_response
from service.notes import Notes, notes, start
from service.telemetry import Telemetry

logger = logging.getLogger(__name__)

_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
_METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS")
_PROBES = ("/health", "/metrics")


class JsonFormatter(logging.Formatter):
    """An object a line; within a request it holds the request's id."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if notes().id:
            fields["request_id"] = notes().id
        fields |= getattr(record, "fields", {})
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


def use_format(kind: Literal["text", "json"]) -> None:
    """Make the handlers that are there already write in this format."""
    if kind == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())


class ObserveRequests:
    """Gives each request its id, answers what nobody answered, and tells of it once it is over."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        reply = _Reply(start(_request_id(scope)), send)
        with self._span(scope) as span:
            try:
                await self._app(scope, receive, reply.send)
            except Exception as error:
                if reply.status is not None:
                    raise
                await error_response(error)(scope, receive, reply.send)
            finally:
                self._tell(scope, reply, span)

    def _span(self, scope: Scope) -> contextlib.AbstractContextManager[Any]:
        tracing = self._telemetry.tracing
        if tracing is None:
            return contextlib.nullcontext()
        return tracing.request(_method(scope), scope["headers"])

    def _tell(self, scope: Scope, reply: "_Reply", span: Any) -> None:
        route, method = _route(scope), _method(scope)
        status = 499 if reply.status is None else reply.status  # 499: the client left first
        seconds = reply.seconds()
        self._telemetry.request(route, method, status, seconds)
        if reply.error is not None:
            self._telemetry.rejected(reply.error)
        if span is not None:
            span.update_name(f"{method} {route}")
            span.set_attribute("http.route", route)
            span.set_attribute("http.response.status_code", status)
            span.set_attribute("clipserve.request_id", reply.notes.id)
        level = logging.DEBUG if route.startswith(_PROBES) and status < 400 else logging.INFO
        fields = reply.fields(method, route, status, seconds)
        others = [f"{name} {value}" for name, value in list(fields.items())[3:]]
        text = f"{method} {route} {status}: {', '.join(others)}"
        logger.log(level, "%s", text, extra={"fields": fields})


class _Reply:
    """What is sent for one request: its start gets the headers that every reply has."""

    def __init__(self, notes: Notes, send: Send) -> None:
        self.notes = notes
        self.status: int | None = None
        self.error: str | None = None
        self._send = send
        self._started = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = dict(message.get("headers", []))
            if ERROR_HEADER.encode() in headers:
                self.error = headers[ERROR_HEADER.encode()].decode()
            message = {**message, "headers": [*message.get("headers", []), *self._headers(headers)]}
        await self._send(message)

    def fields(self, method: str, route: str, status: int, seconds: float) -> dict[str, Any]:
        """For a log that is read by programs."""
        found: dict[str, Any] = {
            "method": method,
            "route": route,
            "status": status,
            "request_id": self.notes.id,
            "ms": round(1000 * seconds, 1),
            "items": self.notes.items,
            "key": self.notes.key,
            "error": self.error,
        }
        stages = self.notes.seconds.copy()
        found |= {f"{name}_ms": round(1000 * s, 1) for name, s in stages.items()}
        return {name: value for name, value in found.items() if value is not None}

    def _headers(self, sent: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        times = {"total": self.seconds(), **self.notes.seconds}
        timing = ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in times.items())
        made = {
            b"x-request-id": self.notes.id.encode(),
            b"x-content-type-options": b"nosniff",
            b"server-timing": timing.encode(),
            **{f"x-{name}-time".encode(): f"{1000 * s:.1f}".encode() for name, s in times.items()},
        }
        return [(name, value) for name, value in made.items() if name not in sent]


def _request_id(scope: Scope) -> str:
    """The client's own if it is short and plain, else a new one."""
    sent = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(sent) == 1 and _SANE_ID.fullmatch(sent[0]):
        return str(sent[0], "ascii")
    return uuid.uuid4().hex


def _route(scope: Scope) -> str:
    return str(getattr(scope.get("route"), "path", "none"))


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in _METHODS else "OTHER"
