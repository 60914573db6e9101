"""The server on a real socket: loading, draining, and connections that bring no request."""

import asyncio
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from clipserve.errors import ConfigError
from service.drain import Gate, Lifecycle
from service.limits import RequestLimits
from service.server import Server, listen
from service.settings import Settings, load_settings

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


@pytest.fixture
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    made = Running(load_settings(**getattr(request, "param", {})))
    made.start()
    yield made
    made.stop()


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


def test_probes_are_answered_while_models_load_and_work_is_not(running: Running):
    with running.client() as client:
        assert client.get("/health/live").status_code == 200
        refused = client.get("/v1/quick")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
    with serving(running) as client:
        assert client.get("/v1/quick").status_code == 200


def test_what_stops_the_loading_stops_the_server(running: Running):
    running.failure = ConfigError("no such model")
    running.may_load.set()
    running.thread.join(WAIT_S)
    assert not running.thread.is_alive()
    assert running.server.failure is running.failure
    assert not running.ready.is_set()


def test_a_signal_lets_requests_end_and_begins_no_other(running: Running):
    answers = []
    with serving(running) as client, running.client() as other:
        assert other.get("/v1/quick").status_code == 200
        asking = threading.Thread(target=lambda: answers.append(client.get("/v1/slow")))
        asking.start()
        assert running.asked.wait(WAIT_S)
        running.signal()
        refused = other.get("/v1/quick")
        while refused.status_code == 200:  # the signal is noticed by the event loop
            refused = other.get("/v1/quick")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["connection"] == "close"
        assert other.get("/health/live").status_code == 200
        running.may_answer.set()
        asking.join(WAIT_S)
    (answer,) = answers
    assert (answer.status_code, answer.json()) == (200, "done")
    assert answer.headers["connection"] == "close"
    running.thread.join(WAIT_S)
    assert not running.thread.is_alive()


def test_after_a_signal_while_loading_it_does_not_say_that_it_is_ready(running: Running):
    with running.client() as client:
        assert client.get("/health/live").status_code == 200
        running.signal()
    running.may_load.set()
    running.thread.join(WAIT_S)
    assert not running.thread.is_alive()
    assert not running.ready.is_set()


@pytest.mark.parametrize("running", [{"shutdown_timeout_s": 0.05}], indirect=True)
def test_a_request_that_does_not_end_is_not_waited_for(running: Running):
    with serving(running), running.connect() as connection:
        connection.sendall(b"GET /v1/slow HTTP/1.1\r\nHost: x\r\n\r\n")
        assert running.asked.wait(WAIT_S)
        running.signal()
        assert is_closed(connection)
        running.may_answer.set()
        running.thread.join(WAIT_S)
        assert not running.thread.is_alive()


@pytest.mark.parametrize("running", [{"body_timeout_s": 0.1}], indirect=True)
@pytest.mark.parametrize(
    "sent", [b"", b"GET /v1/quick HT", b"GET /v1/quick HTTP/1.1\r\nHost: x\r\n"]
)
def test_a_connection_without_a_whole_request_is_closed(running: Running, sent: bytes):
    with serving(running), running.connect() as connection:
        connection.sendall(sent)
        assert is_closed(connection)


@pytest.mark.parametrize("running", [{"body_timeout_s": 0.1}], indirect=True)
def test_a_body_that_goes_on_after_the_answer_is_cut_off(running: Running):
    with serving(running), running.connect() as connection:
        connection.sendall(b"GET /v1/quick HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nx")
        assert b"200 OK" in connection.recv(1000)
        assert is_closed(connection)


@pytest.mark.parametrize("running", [{"body_timeout_s": 0.1}], indirect=True)
def test_an_answer_that_nobody_reads_is_given_up(running: Running):
    with serving(running), running.connect() as connection:
        connection.sendall(b"GET /v1/large HTTP/1.1\r\nHost: x\r\n\r\n")
        assert running.ended.wait(WAIT_S)
        assert is_closed(connection)


def test_a_large_answer_arrives_whole(running: Running):
    with serving(running) as client:
        assert client.get("/v1/large").content == bytes(LARGE)
        assert client.get("/v1/quick").status_code == 200


@pytest.mark.parametrize("running", [{"body_timeout_s": 0.1}], indirect=True)
def test_a_request_may_take_longer_than_its_body(running: Running):
    with serving(running), running.connect() as connection:
        connection.sendall(b"GET /v1/slow HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.settimeout(0.5)
        assert not is_closed(connection)
        running.may_answer.set()
        connection.settimeout(WAIT_S)
        assert b"200 OK" in connection.recv(1000)


@pytest.mark.parametrize("running", [{"max_connections": 2}], indirect=True)
def test_one_connection_too_many_is_closed_and_the_others_work(running: Running):
    with serving(running) as client, running.connect():
        assert client.get("/v1/quick").status_code == 200
        with running.connect() as third:
            assert is_closed(third)
        assert client.get("/v1/quick").status_code == 200


def test_a_taken_port_is_named():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}: Address already"):
            listen("127.0.0.1", port)


def test_an_address_that_is_none_is_named():
    with pytest.raises(ConfigError, match="cannot be listened on"):
        listen("no such host", 0)
