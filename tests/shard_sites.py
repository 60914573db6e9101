"""A server of shards that cuts, stalls, lies and refuses, and a cache for what it sends."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import numpy as np

from clipserve.storage import ShardCache

CONTENT = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_000)


class Site(ThreadingHTTPServer):
    """Serves `files`; each request for a path takes the next of its `faults` first."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str]] = []  # path, Range
        self.etag = '"one"'
        self.ranges = True
        self.halfway = threading.Event()
        self.go_on = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    @classmethod
    @contextmanager
    def serving(cls) -> Iterator[Self]:
        """With `CONTENT` at /a.tar."""
        site = cls()
        site.files["/a.tar"] = CONTENT
        thread = threading.Thread(target=site.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield site
        finally:
            site.go_on.set()
            site.shutdown()
            thread.join()
            site.server_close()

    def share(self, folder: Path) -> str:
        """The address under which a folder of shards is served."""
        for file in folder.iterdir():
            self.files[f"/{folder.name}/{file.name}"] = file.read_bytes()
        return f"{self.url}/{folder.name}"

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is part of these tests."""

    def count(self, path: str) -> int:
        return sum(requested == path for requested, _ in self.requests)


class Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append((path, self.headers.get("Range", "")))
        faults = self.server.faults.get(path, [])
        fault = faults.pop(0) if faults else ""
        if fault.isdecimal():
            self.send_response(int(fault))
            if fault == "302":
                self.send_header("Location", self.path)
                faults.append(fault)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif path not in self.server.files:
            self.send_error(404)
        else:
            self.send_file(self.server.files[path], fault)

    def log_message(self, *_: Any) -> None:
        """Not into the output of the tests."""

    def send_file(self, content: bytes, fault: str) -> None:
        start = 0
        wanted = self.headers.get("Range", "")
        same = self.headers.get("If-Range", self.server.etag) == self.server.etag
        if wanted and self.server.ranges and same:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        body = content[start:]
        if fault == "wrong":
            body = OTHER[: len(body)]
        if fault == "more":
            body += b"x"
        if fault == "encoded":
            body = gzip.compress(body)
            self.send_header("Content-Encoding", "gzip")
        if fault != "unsized":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2 if fault in ("cut", "stall", "trickle") else len(body)
        self.wfile.write(body[:half])
        self.server.halfway.set()
        if fault == "stall":
            self.server.go_on.wait(30)
        if fault == "trickle":
            for i in range(half, len(body)):
                self.wfile.write(body[i : i + 1])
                if self.server.go_on.wait(0.01):
                    break
        self.close_connection = True


def small_cache(folder: Path) -> ShardCache:
    """Three shards of 300,000 bytes fit."""
    return ShardCache(folder / "cache", 2**20, retries=2, timeout=5, backoff_s=0.001)


def digest(content: bytes) -> str:
    return sha256(content).hexdigest()


def copies(cache: ShardCache) -> list[Path]:
    return sorted(cache.folder.glob("*.tar"))


def temporary(cache: ShardCache) -> list[Path]:
    return sorted(cache.folder.glob("*.tmp"))
