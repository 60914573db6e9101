"""What every request may cost, enforced before any route sees it, as one raw ASGI middleware.

It counts the body while it arrives (never trusting Content-Length), bounds the bodies and requests
held at once, and watches the client: when the connection closes, or the time is up, the route's
task is cancelled, which takes its items out of the model's queue.
"""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import (
    BodyTooLarge,
    Overloaded,
    RequestError,
    RequestTimeout,
    SlowBody,
    error_response,
)
from service.settings import Settings

_ALWAYS_SERVED = ("/health", "/metrics")


class ClientGone(Exception):
    """The connection closed before the body was complete."""


class RequestLimits:
    """Reads the whole body within its limits, then runs the app on it within the time allowed."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._requests = 0
        self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = bytearray()
        self._requests += 1
        try:
            if not scope["path"].startswith(_ALWAYS_SERVED):
                self._check_load()
            await self._read_body(scope, receive, body)
            await self._run(scope, receive, send, bytes(body))
        except RequestError as error:
            await error_response(error)(scope, receive, send)
        except ClientGone:
            return
        finally:
            self._requests -= 1
            self._bytes -= len(body)

    def _check_load(self) -> None:
        if self._requests > self._settings.max_requests:
            raise Overloaded(
                f"{self._settings.max_requests} requests are being served; come back later"
            )

    async def _read_body(self, scope: Scope, receive: Receive, body: bytearray) -> None:
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit():
            raise RequestError("Content-Length is not a number")
        self._check_size(int(announced[:20]))
        limit = self._settings.body_timeout_s
        try:
            async with asyncio.timeout(limit):
                await self._fill(receive, body)
        except TimeoutError:
            raise SlowBody(f"the body took over {limit:g} s to arrive") from None

    async def _fill(self, receive: Receive, body: bytearray) -> None:
        """Append the chunks as they come; what `body` holds is counted in `_bytes`."""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk = message.get("body", b"")
            self._check_size(len(body) + len(chunk))
            if self._bytes + len(chunk) > self._settings.max_inflight_bytes:
                raise Overloaded("too many bytes of requests are being served; come back later")
            body += chunk
            self._bytes += len(chunk)
            if not message.get("more_body", False):
                return

    def _check_size(self, size: int) -> None:
        limit = self._settings.max_body_bytes
        if size > limit:
            raise BodyTooLarge(
                f"the body is larger than {limit} bytes; send fewer or smaller items, or raise"
                " CLIPSERVE_MAX_BODY_BYTES"
            )

    async def _run(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        started = False

        async def send_noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        limit = self._settings.request_timeout_s
        watcher = asyncio.ensure_future(_wait_for_disconnect(receive))
        app = asyncio.ensure_future(self._app(scope, _replay(body, watcher), send_noting))
        try:
            await asyncio.wait({app, watcher}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if started:  # let the answer go out
                await asyncio.wait({app}, timeout=limit)
            if app.done():
                await app
            elif not started and not watcher.done():
                raise RequestTimeout(f"the answer took over {limit:g} s; its work was dropped")
        finally:
            await _stop(app)
            await _stop(watcher)


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
