"""A server on a real socket, in a thread, with handles for a test to turn."""

import asyncio
import signal
import socket
import threading
from dataclasses import dataclass, field

import httpx
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from service.drain import Gate, Lifecycle
from service.limits import RequestLimits
from service.server import Server, listen
from service.settings import Settings

WAIT_S = 20
LARGE = 2**25
"""bytes, more than the kernel keeps for a connection"""


@dataclass
class Running:
    """A server in a thread, and the handles that a test turns."""

    settings: Settings
    may_load: threading.Event = field(default_factory=threading.Event)
    may_answer: threading.Event = field(default_factory=threading.Event)
    asked: threading.Event = field(default_factory=threading.Event)
    ready: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    """a large answer has gone out, or nowhere"""
    left: threading.Event = field(default_factory=threading.Event)
    """a request saw that its client did"""
    failure: Exception | None = None

    def start(self) -> None:
        lifecycle = Lifecycle("loading")
        self.listener = listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.server = Server(
            self._app(lifecycle),
            self.settings,
            lifecycle,
            load=self._load,
            say_ready=self.ready.set,
        )
        self.thread = threading.Thread(target=self.server.run_until_signal, args=[self.listener])
        self.thread.start()

    def _app(self, lifecycle: Lifecycle) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/slow")
        async def slow() -> str:
            self.asked.set()
            await asyncio.to_thread(self.may_answer.wait)
            return "done"

        @app.get("/v1/quick")
        @app.get("/health/live")
        async def quick() -> str:
            return "done"

        async def large(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await Response(bytes(LARGE))(scope, receive, send)
            finally:
                self.ended.set()

        async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
            self.asked.set()
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left.set()

        async def echo(request: Request) -> Response:
            body = await request.body()
            return Response(body, headers={"X-Headers": str(len(request.headers))})

        app.mount("/v1/waiting", waiting)
        app.router.routes.append(Route("/v1/echo", echo, methods=["POST"]))
        app.router.routes.append(Route("/v1/large", RequestLimits(large, self.settings)))
        app.add_middleware(Gate, lifecycle=lifecycle)
        return app

    def _load(self) -> None:
        self.may_load.wait()
        if self.failure is not None:
            raise self.failure

    def signal(self) -> None:
        self.server.handle_exit(signal.SIGTERM, None)
        self.server._captured_signals.clear()  # which would be raised again, in a main thread only

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=WAIT_S)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)

    def stop(self) -> None:
        self.may_load.set()
        self.may_answer.set()
        self.server.should_exit = True
        self.thread.join(WAIT_S)
        self.listener.close()
        assert not self.thread.is_alive()


def serving(running: Running) -> httpx.Client:
    running.may_load.set()
    assert running.ready.wait(WAIT_S)
    return running.client()


def is_closed(connection: socket.socket) -> bool:
    """Waits until it is, or for the socket's own timeout; what comes before is read over."""
    try:
        while connection.recv(1000):
            pass
        return True
    except ConnectionError:
        return True
    except TimeoutError:
        return False
