"""Fetching from a loopback server that misbehaves in every way it can."""

import gzip
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType

import pytest
from conftest import encode, make_picture

from clipserve.errors import SampleError
from clipserve.images import ImageLimits
from clipserve.sources import Record, Url
from clipserve.sources.fetch import Fetcher, FetchLimits, read_image

PICTURE = encode(make_picture(), "JPEG")
LIMITS = FetchLimits(timeout_s=10, total_s=2.0, backoff_s=0.01)


class Server(ThreadingHTTPServer):
    """Counts what is asked of it; `stop` ends what hangs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.stop = threading.Event()
        self.busy, self.most_busy = 0, 0
        self.lock = threading.Lock()

    def url(self, path: str) -> Url:
        return Url(f"http://127.0.0.1:{self.server_port}{path}")


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        with self.server.lock:
            self.server.asked[path] += 1
            asked = self.server.asked[path]
        if path == "/ok.jpg" or (path == "/flaky" and asked > 2) or (path == "/cut" and asked > 1):
            self.answer(200, PICTURE)
        elif path == "/cut":
            self.answer(200, PICTURE[:100], len(PICTURE))
        elif path == "/flaky":
            self.answer(503, b"later")
        elif path == "/gzip":
            self.answer(200, gzip.compress(PICTURE), headers={"content-encoding": "gzip"})
        elif path == "/bomb":
            bomb = gzip.compress(bytes(20 * 2**20))
            self.answer(200, bomb, headers={"content-encoding": "gzip"})
        elif path == "/hang":
            self.server.stop.wait(20)
        elif path == "/drip":
            self.drip(b"x", 0.1)
        elif path == "/endless":
            self.drip(bytes(2**16), 0)
        elif path == "/loop":
            self.answer(302, b"", headers={"location": "/loop"})
        elif path == "/to-file":
            self.answer(302, b"", headers={"location": "file:///etc/passwd"})
        elif path == "/moved":
            self.answer(301, b"", headers={"location": "/ok.jpg"})
        elif path == "/busy":
            self.count_busy()
        else:
            self.answer(404, b"not here")

    def answer(
        self,
        status: int,
        body: bytes,
        length: int | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self, piece: bytes, pause_s: float) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while not self.server.stop.wait(pause_s):
                self.wfile.write(piece)
        except OSError:
            return  # the client has had enough

    def count_busy(self) -> None:
        with self.server.lock:
            self.server.busy += 1
            self.server.most_busy = max(self.server.most_busy, self.server.busy)
        self.server.stop.wait(0.05)
        with self.server.lock:
            self.server.busy -= 1
        self.answer(200, PICTURE)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.stop.set()
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.fixture
def fetcher() -> Iterator[Fetcher]:
    with Fetcher(2**20, LIMITS) as opened:
        yield opened


@pytest.mark.parametrize("path", ["/ok.jpg", "/moved", "/flaky", "/cut", "/gzip"])
def test_what_answers_in_the_end_is_fetched(server: Server, fetcher: Fetcher, path: str) -> None:
    assert fetcher.fetch(server.url(path)) == PICTURE


@pytest.mark.parametrize(
    ("path", "reason", "asked"),
    [
        ("/no.jpg", "status 404 Not Found", 1),
        ("/drip", "not whole after 2 s", 1),
        ("/endless", "over 1048576 bytes", 1),
        ("/bomb", "over 1048576 bytes", 1),
        ("/loop", "redirects", 6),
        ("/to-file", "protocol", 1),
    ],
)
def test_what_does_not_is_given_up(
    server: Server, fetcher: Fetcher, path: str, reason: str, asked: int
) -> None:
    with pytest.raises(SampleError, match=reason) as caught:
        fetcher.fetch(server.url(path))
    assert caught.value.kind == "fetch_failed"
    assert server.asked[path] == asked


def test_a_server_that_says_nothing_is_given_up(server: Server) -> None:
    with (
        Fetcher(2**20, replace(LIMITS, timeout_s=0.3)) as fetcher,
        pytest.raises(SampleError, match=r"no answer within 0\.3 s \(3 tries\)"),
    ):
        fetcher.fetch(server.url("/hang"))
    assert server.asked["/hang"] == 3


def test_a_server_that_stays_busy_is_named_with_its_status(server: Server) -> None:
    with (
        Fetcher(2**20, replace(LIMITS, tries=2)) as fetcher,
        pytest.raises(SampleError, match=r"status 503 Service Unavailable \(2 tries\)"),
    ):
        fetcher.fetch(server.url("/flaky"))


def test_nobody_listens(fetcher: Fetcher) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(SampleError, match=r"\(3 tries\)"):
        fetcher.fetch(Url(f"http://127.0.0.1:{port}/x"))


@pytest.mark.parametrize(
    "address", ["http://", "http://[::1", "http://a b/", "http://x:99999999/", "http://\0/"]
)
def test_an_address_that_is_none(fetcher: Fetcher, address: str) -> None:
    with pytest.raises(SampleError) as caught:
        fetcher.fetch(Url(address))
    assert caught.value.kind == "fetch_failed"


def test_messages_hold_no_secrets(server: Server, fetcher: Fetcher) -> None:
    address = server.url("/no.jpg?token=secret").address.replace("//", "//user:password@")
    with pytest.raises(SampleError) as caught:
        fetcher.fetch(Url(address))
    assert "/no.jpg: status 404" in str(caught.value)
    assert not any(word in str(caught.value) for word in ("secret", "password", "user"))


def test_pictures_are_read_wherever_they_are(
    server: Server, fetcher: Fetcher, tmp_path: Path
) -> None:
    (tmp_path / "a.jpg").write_bytes(PICTURE)
    for image in (tmp_path / "a.jpg", PICTURE, server.url("/ok.jpg")):
        assert read_image(Record("k", "o", image, ("c",)), ImageLimits(), fetcher) == PICTURE


def test_no_more_connections_than_threads_are_allowed(server: Server) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with (
        Fetcher(2**20, replace(LIMITS, threads=3)) as fetcher,
        ThreadPoolExecutor(8) as pool,
    ):
        found = list(pool.map(lambda _: fetcher.fetch(server.url("/busy")), range(24)))
    assert found == [PICTURE] * 24
    assert 1 <= server.most_busy <= 3
