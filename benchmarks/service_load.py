"""Load on an HTTP service: closed loop (so many clients, each asks again when it is answered) and
open loop (so many requests a second, whatever becomes of them).

Bare sockets and requests whose bytes are made beforehand, but for a number that makes each another:
on a machine with two cores the load must cost next to nothing, and no service may answer from a
cache what it has not seen. Start at `closed_loop`.
"""

import asyncio
import base64
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import uvloop

Body = Callable[[int], bytes]
"""the body of the n-th request"""

DIGITS = 12
"""of the number that makes each request another"""
_SETTLE = 0.15
"""part of the time that passes before answers count"""


@dataclass(frozen=True)
class Target:
    """Where requests go, and what they hold."""

    host: str
    port: int
    path: str
    body: Body
    items: int
    """in each request"""

    def request(self, number: int) -> bytes:
        body = self.body(number)
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@dataclass
class Load:
    """What came of it."""

    seconds: float = 0.0
    """in which answers counted"""
    latencies_s: list[float] = field(default_factory=list)
    refused: int = 0
    """answered with 429"""
    failed: int = 0
    """answered with anything else but 200, or not at all"""
    drain_s: float = 0.0
    """of an open loop: from the last request to the last answer"""

    def summary(self, items: int) -> dict[str, float]:
        quantiles = np.quantile(self.latencies_s or [float("nan")], [0.5, 0.95, 0.99])
        names = ("p50_ms", "p95_ms", "p99_ms")
        return {
            "items_per_s": round(items * len(self.latencies_s) / self.seconds, 2),
            **{name: round(1000 * float(q), 2) for name, q in zip(names, quantiles, strict=True)},
            "requests": len(self.latencies_s),
            "refused": self.refused,
            "failed": self.failed,
        }


_numbers = itertools.count()


def closed_loop(target: Target, clients: int, seconds: float, least: int = 2) -> Load:
    """`clients` at once for `seconds`, and on until each has been answered `least` times."""
    return uvloop.run(_closed(target, clients, seconds, least))


def open_loop(target: Target, rate: float, seconds: float, seed: int = 0) -> Load:
    """`rate` requests a second at random times, each on a connection that is free or new."""
    return uvloop.run(_open(target, rate, seconds, seed))


async def _closed(target: Target, clients: int, seconds: float, least: int) -> Load:
    load, started = Load(), time.perf_counter()
    begin, longest = started + _SETTLE * seconds, started + 6 * seconds
    answered = [0] * clients

    def is_over() -> bool:
        now = time.perf_counter()
        return now > longest or (now > started + seconds and min(answered) >= least)

    async def client(number: int) -> None:
        connection = Connection(target)
        while not is_over():
            sent = time.perf_counter()
            status = await connection.ask(target.request(next(_numbers)))
            answered[number] += 1
            if time.perf_counter() > begin:
                _count(load, status, time.perf_counter() - sent)
        connection.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    load.seconds = time.perf_counter() - begin
    return load


async def _open(target: Target, rate: float, seconds: float, seed: int) -> Load:
    load, free = Load(), list[Connection]()
    random = np.random.default_rng(seed)
    started = time.perf_counter()
    due = started

    async def one(due: float) -> None:
        connection = free.pop() if free else Connection(target)
        status = await connection.ask(target.request(next(_numbers)))
        _count(load, status, time.perf_counter() - due)
        free.append(connection)

    tasks = []
    while due < started + seconds:
        due += random.exponential(1 / rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(due)))
    last = time.perf_counter()
    await asyncio.gather(*tasks)
    load.seconds, load.drain_s = time.perf_counter() - started, time.perf_counter() - last
    for connection in free:
        connection.close()
    return load


def _count(load: Load, status: int, seconds: float) -> None:
    if status == 200:
        load.latencies_s.append(seconds)
    elif status == 429:
        load.refused += 1
    else:
        load.failed += 1


class Connection:
    """One that is kept open, and opened again when the other side closed it."""

    def __init__(self, target: Target) -> None:
        self._address = target.host, target.port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> int:
        """The status of the answer, 0 when there is none."""
        if self._streams is not None and self._streams[0].at_eof():
            self.close()  # the other side did, while nothing was asked
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection(*self._address, limit=2**26)
            reader, writer = self._streams
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            if "transfer-encoding: chunked" in head:
                await reader.readuntil(b"0\r\n\r\n")
            else:
                length = head.partition("content-length:")[2].split("\r\n", 1)[0]
                await reader.readexactly(int(length))
            if "connection: close" in head:
                self.close()
            return int(head[9:12])
        except (OSError, EOFError, asyncio.LimitOverrunError, ValueError):
            self.close()
            return 0

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None


def numbered(template: object, place: str) -> Body:
    """JSON whose text `place` becomes the number of the request, in DIGITS digits."""
    before, after = json.dumps(template).encode().split(place.encode())
    return lambda number: before + f"{number:0{DIGITS}d}".encode() + after


def pictures(jpegs: list[bytes], wrap: Callable[[list[str]], object]) -> Body:
    """JSON of `wrap`, given the base64 of each picture, which gets a comment with its own number.

    Comment and what precedes it are a multiple of three bytes: only they are encoded anew.
    """
    rests = [base64.b64encode(jpeg[2:]).decode() for jpeg in jpegs]
    places = [f"@{i}@" for i in range(len(jpegs))]
    whole = json.dumps(wrap([place + rest for place, rest in zip(places, rests, strict=True)]))
    pieces = []
    for place in places:
        before, whole = whole.split(place)
        pieces.append(before.encode())
    last = whole.encode()

    def body(number: int) -> bytes:
        parts = []
        for index, piece in enumerate(pieces):
            comment = f"{number * len(pieces) + index:0{DIGITS}d}".encode()
            start = b"\xff\xd8\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
            parts += [piece, base64.b64encode(start)]
        return b"".join([*parts, last])

    return body
