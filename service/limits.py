"""What every request may cost, enforced before any route sees it, as one raw ASGI middleware.

It reads the headers for what is never right, counts the body while it arrives (never trusting
Content-Length), bounds the bodies, answers and requests held at once, and watches the client: when
the connection closes, or the time is up, the route's task is cancelled, which takes its items out
of the model's queue. What needs no key is not counted, so that it takes nobody's place, and has no
body.
"""

import asyncio
import math
import threading
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.auth import is_open
from service.errors import (
    BodyTooLarge,
    HeadersTooLarge,
    Overloaded,
    RequestError,
    RequestTimeout,
    SlowBody,
    UnsupportedBody,
    error_response,
)
from service.notes import notes
from service.settings import Settings

Headers = list[tuple[bytes, bytes]]
_ALWAYS_SERVED = "/metrics"
"""it tells of an overload while there is one"""
_PIECE_BYTES = 64 * 2**10
"""of an answer that the server gets at once: what it was given and the client does not read stays
in memory, counted by nobody"""
_FOR_MODELS = ("/v1/embeddings", "/v1/classify", "/v1/match")
_LARGE_BODY_BYTES = 32 * 2**10
"""is not read for these if no model has room: it holds pictures, and reading so much to refuse it
would take time from those that are answered"""
_LEAST_BYTES = 8 * 2**20
"""of an answer that a client has to read in a request's time, or it is cut"""


class ClientGone(Exception):
    """Nobody waits for an answer: the connection closed, or the time was up."""


class Load:
    """The requests being served, and the bytes that they and their answers hold."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self.requests = 0
        self.bytes = 0

    def check_requests(self) -> None:
        """Overloaded if there are too many."""
        if self.requests > self._settings.max_requests:
            raise Overloaded(
                f"{self._settings.max_requests} requests are being served; come back later"
            )

    def add(self, size: int) -> None:
        """Overloaded if so many bytes more are too many; fewer never are. From any thread."""
        with self._lock:
            if size > 0 and self.bytes + size > self._settings.max_inflight_bytes:
                raise Overloaded(
                    "too many bytes of requests and answers are being served; come back later, or"
                    " ask for less at once"
                )
            self.bytes += size


class RequestLimits:
    """Reads the whole body within its limits, then runs the app on it within the time allowed."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        load: Load | None = None,
        check_room: Callable[[], None] = lambda: None,
    ) -> None:
        self._app = app
        self._settings = settings
        self._load = load or Load(settings)
        self._check_room = check_room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        load = Load(self._settings) if is_open(scope["path"]) else self._load
        held = _Held(self._settings.max_body_bytes, load)
        load.requests += 1
        try:
            if scope["path"] != _ALWAYS_SERVED:
                load.check_requests()
            seconds = self._check_headers(scope, held)
            body = await self._read_body(receive, held)
            notes().hold, notes().expect = held.add, held.expect
            if seconds < self._settings.request_timeout_s:  # which the client asked for
                notes().deadline_s = time.monotonic() + seconds
            answer = _Answer(send, held, may_be_refused=scope["path"] != _ALWAYS_SERVED)
            await self._run(scope, receive, answer, body, seconds)
        except RequestError as error:
            await error_response(error)(scope, receive, send)
        except ClientGone:
            return
        finally:
            load.requests -= 1
            held.give_back()

    def _check_headers(self, scope: Scope, held: "_Held") -> float:
        """RequestError for a request that no route would read; how long its answer may take."""
        headers: Headers = scope["headers"]
        settings = self._settings
        size = len(scope.get("query_string", b"")) + len(scope.get("raw_path") or b"")
        size += sum(len(name) + len(value) for name, value in headers)
        if len(headers) > settings.max_headers or size > settings.max_header_bytes:
            raise HeadersTooLarge(
                f"over {settings.max_headers} header lines or {settings.max_header_bytes} bytes of"
                " them and the address"
            )
        length = _content_length(headers)
        held.check(length)
        if is_open(scope["path"]) and (length or _values(headers, b"transfer-encoding")):
            raise BodyTooLarge("what needs no key takes no body; send none")
        _check_body_is_plain(headers)
        if length > _LARGE_BODY_BYTES and scope["path"] in _FOR_MODELS:
            self._check_room()
        return min(settings.request_timeout_s, _wanted_timeout(headers))

    async def _read_body(self, receive: Receive, held: "_Held") -> bytes:
        limit = self._settings.body_timeout_s
        body = bytearray()
        try:
            async with asyncio.timeout(limit):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    chunk = message.get("body", b"")
                    held.add(len(chunk))
                    body += chunk
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise SlowBody(f"the body took over {limit:g} s to arrive") from None

    async def _run(
        self, scope: Scope, receive: Receive, answer: "_Answer", body: bytes, limit: float
    ) -> None:
        watcher = asyncio.ensure_future(_wait_for_disconnect(receive))
        app = asyncio.ensure_future(self._app(scope, _replay(body, watcher), answer.send))
        try:
            await asyncio.wait({app, watcher}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if answer.started:
                await self._let_out(app, answer)
            if app.done():
                await app
                answer.check()
            elif not answer.started and not watcher.done():
                raise RequestTimeout(
                    f"the answer took over {limit:g} s and is not waited for; a write that was"
                    " begun may still complete"
                )
        finally:
            await _stop(app)
            await _stop(watcher)

    async def _let_out(self, app: "asyncio.Future[None]", answer: "_Answer") -> None:
        """While its client reads on, and not so slowly that it keeps its place for hours."""
        is_read = True
        while is_read and not app.done():
            sent = answer.sent
            await asyncio.wait({app}, timeout=self._settings.request_timeout_s)
            is_read = answer.sent - sent >= _LEAST_BYTES


class _Held:
    """The bytes that one request holds: its body, what is fetched for it, and what its answer is
    made from or, once it is there, a large answer."""

    def __init__(self, limit: int, load: Load) -> None:
        self._limit = limit
        self._load = load
        self._lock = threading.Lock()
        self._body = 0
        self._answer = 0
        self._is_over = False

    def check(self, size: int) -> None:
        """BodyTooLarge if so many bytes more are too many for one request."""
        if self._body + size > self._limit:
            raise BodyTooLarge(
                f"the body, with what is fetched for it, is larger than {self._limit} bytes; send"
                " fewer or smaller items, or raise CLIPSERVE_MAX_BODY_BYTES"
            )

    def add(self, size: int) -> None:
        self.check(size)
        self._load.add(size)
        self._body += size

    def expect(self, size: int) -> None:
        """What is about to be read for the answer, or less again, from any thread. ClientGone where
        that thread works for nobody any more."""
        with self._lock:
            if self._is_over:
                raise ClientGone
            self._load.add(size)
            self._answer += size

    def set_answer(self, size: int) -> None:
        """The answer is there, and what it was made from is gone."""
        with self._lock:
            self._load.add(size - self._answer)
            self._answer = size

    def give_back(self) -> None:
        """The request is over."""
        with self._lock:
            self._is_over = True
            self._load.add(-self._body - self._answer)


class _Answer:
    """What the route sends: counted before any of it goes out, and given to the server no faster
    than the client reads, while the request keeps its place."""

    def __init__(self, send: Send, held: _Held, *, may_be_refused: bool = True) -> None:
        self.started = False
        self.sent = 0
        """bytes that the server took"""
        self._send = send
        self._held = held
        self._may_be_refused = may_be_refused
        self._refusal: Overloaded | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._count(_content_length(message.get("headers", [])))
        if self._refusal is not None:
            return
        self.started = True
        body = message.get("body", b"")
        if len(body) > _PIECE_BYTES:
            for start in range(0, len(body), _PIECE_BYTES):
                piece = body[start : start + _PIECE_BYTES]
                await self._send({**message, "body": piece, "more_body": True})
                self.sent += len(piece)
            message = {**message, "body": b""}
        await self._send(message)

    def check(self) -> None:
        """Overloaded if there was no room for it."""
        if self._refusal is not None:
            raise self._refusal

    def _count(self, size: int) -> None:
        if not self._may_be_refused:  # nor is it counted, or what comes next would be
            return
        try:
            self._held.set_answer(size if size > _PIECE_BYTES else 0)
        except Overloaded as error:
            self._refusal = error


def _values(headers: Headers, name: bytes) -> list[bytes]:
    return [value.strip() for key, value in headers if key == name]


def _content_length(headers: Headers) -> int:
    """What is announced, 0 if nothing is; two announcements are how requests are smuggled."""
    lengths = _values(headers, b"content-length")
    if len(lengths) > 1 or (lengths and _values(headers, b"transfer-encoding")):
        raise RequestError("the length of the body is announced twice")
    if not lengths:
        return 0
    if not lengths[0].isdigit():
        raise RequestError("Content-Length is not a number")
    return int(lengths[0][:20])


def _check_body_is_plain(headers: Headers) -> None:
    if any(value.lower() != b"identity" for value in _values(headers, b"content-encoding")):
        raise UnsupportedBody("a compressed body is not read; send it without Content-Encoding")
    kinds = _values(headers, b"content-type")
    if len(kinds) > 1:
        raise RequestError("Content-Type is given twice")
    if kinds and kinds[0].lower().startswith(b"application/x-www-form-urlencoded"):
        raise UnsupportedBody(
            "an urlencoded form is not read; send JSON with the header Content-Type:"
            " application/json, or multipart/form-data"
        )


def _wanted_timeout(headers: Headers) -> float:
    """Seconds from X-Request-Timeout, for ever without it."""
    values = _values(headers, b"x-request-timeout")
    if not values:
        return math.inf
    try:
        seconds = float(values[0])
    except ValueError:
        seconds = math.nan
    if len(values) > 1 or not 0 < seconds < math.inf:
        raise RequestError("X-Request-Timeout must be one number of seconds over 0")
    return seconds


def _replay(body: bytes, disconnected: "asyncio.Future[None]") -> Receive:
    """A `receive` that gives the body in one piece, and then waits for the client to leave."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.shield(disconnected)
        return {"type": "http.disconnect"}

    return receive


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stop(task: "asyncio.Future[None]") -> None:
    """Cancel and wait for the end; an exception on the way there is nobody's any more."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
