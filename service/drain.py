"""From loading to the end: what is answered while models load, and on the way out.

`Lifecycle` knows the phase; `Gate`, as middleware, refuses work outside of serving. Probes, metrics
and the page's files pass always: /health/live says that the process answers, /health/ready asks the
phase.
"""

import asyncio
from typing import Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.auth import is_open
from service.errors import NotReady, error_response

Phase = Literal["loading", "serving", "draining"]
_MESSAGES = {
    "loading": "the models are being loaded; come back in a moment",
    "draining": "the service is shutting down; ask another one",
}


class Lifecycle:
    """The phase, and how many requests are being served; used from one event loop."""

    def __init__(self, phase: Phase = "serving") -> None:
        self.phase: Phase = phase
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def check(self) -> None:
        """NotReady outside of serving."""
        if self.phase != "serving":
            error = NotReady(_MESSAGES[self.phase], code=self.phase)
            error.headers = {"Retry-After": "1", "Connection": "close"}
            raise error

    def enter(self) -> None:
        self._active += 1
        self._idle.clear()

    def leave(self) -> None:
        self._active -= 1
        if not self._active:
            self._idle.set()

    async def drain(self, timeout_s: float) -> None:
        """Refuse what comes from now on; wait for what is being served, but not for ever."""
        self.phase = "draining"
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return


class Gate:
    """Passes requests while the service serves; on the way out it closes their connections."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self._app = app
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(scope["path"]) or scope["path"] == "/metrics":
            await self._app(scope, receive, send)
            return
        try:
            self._lifecycle.check()
        except NotReady as error:
            await error_response(error)(scope, receive, send)
            return

        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self._lifecycle.phase == "draining":
                headers = [*message.get("headers", []), (b"connection", b"close")]
                message = {**message, "headers": headers}
            await send(message)

        self._lifecycle.enter()
        try:
            await self._app(scope, receive, send_closing)
        finally:
            self._lifecycle.leave()
