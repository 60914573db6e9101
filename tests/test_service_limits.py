"""The middleware against a bare ASGI app, message by message."""

import asyncio
import contextvars
import math
import time
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from starlette.responses import PlainTextResponse

from service.errors import BodyTooLarge, Overloaded, error_response
from service.limits import ClientGone, Load, RequestLimits
from service.notes import notes, start
from service.settings import Settings

Messages = list[dict]
NEVER = object()


async def echo_size(scope, receive, send) -> None:
    size = 0
    while True:
        message = await receive()
        size += len(message["body"])
        if not message["more_body"]:
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def call(
    app: Callable, messages: list, headers: Any = None, query: bytes = b"", **settings: object
) -> tuple[int | None, bytes, list]:
    """Status (None if there was no answer), body, and the messages that were not asked for."""
    limits = RequestLimits(app, Settings(**settings))
    return asyncio.run(_call(limits, messages, headers, query=query))


async def _call(
    limits: RequestLimits,
    messages: list,
    headers: dict[str, str] | list[tuple[str, str]] | None = None,
    path: str = "/v1/embeddings",
    query: bytes = b"",
):
    left = list(messages)
    sent: Messages = []

    async def receive() -> dict:
        if not left or left[0] is NEVER:
            await asyncio.Event().wait()
        return left.pop(0)

    async def send(message: dict) -> None:
        sent.append(message)

    pairs = headers.items() if isinstance(headers, dict) else headers or []
    raw = [(name.lower().encode(), value.encode()) for name, value in pairs]
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": query,
        "headers": raw,
    }
    await limits(scope, receive, send)
    status = sent[0]["status"] if sent else None
    return status, b"".join(message.get("body", b"") for message in sent), left


def chunk(size: int, more: bool = True) -> dict:
    return {"type": "http.request", "body": b"x" * size, "more_body": more}


def code(body: bytes) -> str:
    return orjson.loads(body)["error"]["code"]


def test_a_body_within_the_limit_arrives_whole():
    status, body, _ = call(echo_size, [chunk(60), chunk(40, more=False)], max_body_bytes=100)
    assert (status, body) == (200, b"100")


def test_chunks_are_counted_and_reading_stops_at_the_limit():
    status, body, left = call(echo_size, [chunk(60)] * 10, max_body_bytes=100)
    assert (status, code(body)) == (413, "body_too_large")
    assert len(left) == 8


def test_an_announced_body_over_the_limit_is_not_read():
    messages = [chunk(101, more=False)]
    status, _, left = call(echo_size, messages, {"Content-Length": "101"}, max_body_bytes=100)
    assert (status, len(left)) == (413, 1)


@pytest.mark.parametrize("length", ["-1", "abc", "1e3", ""])
def test_a_content_length_that_is_no_number_is_refused(length):
    status, _, _ = call(echo_size, [chunk(1, more=False)], {"Content-Length": length})
    assert status == 400


@pytest.mark.parametrize(
    "headers",
    [
        [("Content-Length", "1"), ("Content-Length", "1")],
        [("Content-Length", "1"), ("Content-Length", "2")],
        [("Content-Length", "1"), ("Transfer-Encoding", "chunked")],
        [("Content-Type", "application/json"), ("Content-Type", "image/png")],
    ],
)
def test_what_two_readers_might_read_differently_is_refused(headers):
    status, body, left = call(echo_size, [chunk(1, more=False)], headers)
    assert (status, code(body), len(left)) == (400, "invalid_request", 1)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Encoding": "gzip"}, 415),
        ({"Content-Encoding": "identity, br"}, 415),
        ({"Content-Encoding": "identity"}, 200),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "APPLICATION/X-WWW-Form-Urlencoded; charset=utf-8"}, 415),
        ({"Content-Type": "application/json"}, 200),
    ],
)
def test_bodies_that_would_have_to_be_unpacked_are_not_read(headers, status):
    got, _, left = call(echo_size, [chunk(1, more=False)], headers)
    assert (got, len(left)) == (status, status != 200)


def test_too_many_or_too_large_headers_get_431():
    many = [(f"x-{i}", "") for i in range(11)]
    status, body, _ = call(echo_size, [chunk(1, more=False)], many, max_headers=10)
    assert (status, code(body)) == (431, "headers_too_large")
    large = [("x", "y" * 1000)]
    assert call(echo_size, [chunk(1, more=False)], large, max_header_bytes=1000)[0] == 431
    assert call(echo_size, [chunk(1, more=False)], large, max_header_bytes=1001)[0] == 200
    query = b"q" * 1000
    assert call(echo_size, [chunk(1, more=False)], query=query, max_header_bytes=999)[0] == 431


def test_a_body_that_does_not_arrive_gets_408():
    status, body, _ = call(echo_size, [chunk(1), NEVER], body_timeout_s=0.02)
    assert (status, code(body)) == (408, "body_timeout")


def test_an_answer_that_takes_too_long_gets_504_and_is_cancelled():
    cancelled = []

    async def slow(scope, receive, send) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    status, body, _ = call(slow, [chunk(1, more=False)], request_timeout_s=0.02)
    assert (status, code(body), cancelled) == (504, "timeout", [True])
    assert b"may still complete" in body


async def never(scope, receive, send) -> None:
    await asyncio.Event().wait()


def test_a_client_may_ask_for_less_time_but_not_for_more():
    headers = {"X-Request-Timeout": "0.02"}
    status, body, _ = call(never, [chunk(1, more=False)], headers)
    assert (status, code(body)) == (504, "timeout")
    headers = {"X-Request-Timeout": "1e9"}
    assert call(never, [chunk(1, more=False)], headers, request_timeout_s=0.02)[0] == 504


def test_only_a_time_that_the_client_gave_is_a_deadline():
    seen = []

    async def look(scope, receive, send) -> None:
        seen.append(notes().deadline_s - time.monotonic())
        await echo_size(scope, receive, send)

    def ask(headers) -> None:
        start("")
        call(look, [chunk(1, more=False)], headers)

    for headers in ({}, {"X-Request-Timeout": "1e9"}, {"X-Request-Timeout": "7"}):
        contextvars.Context().run(ask, headers)
    assert seen[:2] == [math.inf, math.inf]
    assert 6 < seen[2] <= 7


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon", "", "1 2"])
def test_a_time_that_is_none_is_refused(seconds):
    assert call(never, [chunk(1, more=False)], {"X-Request-Timeout": seconds})[0] == 400


def test_what_a_request_fetches_counts_as_its_body():
    async def fetch(scope, receive, send) -> None:
        try:
            notes().hold(60)
            notes().hold(60)
        except BodyTooLarge as error:
            await error_response(error)(scope, receive, send)

    async def scenario() -> tuple:
        start("id")
        settings = Settings(max_body_bytes=100)
        load = Load(settings)
        answer = await _call(RequestLimits(fetch, settings, load), [chunk(10, more=False)])
        return *answer[:2], load.bytes, load.requests

    status, body, held, requests = asyncio.run(scenario())
    assert (status, code(body)) == (413, "body_too_large")
    assert (held, requests) == (0, 0)


def test_what_an_answer_is_made_from_is_in_flight_until_the_answer_is_there():
    settings, seen = Settings(max_inflight_bytes=100_000), []
    load = Load(settings)

    async def read(scope, receive, send) -> None:
        expect = notes().expect
        for size in (90_000, -50_000):
            await asyncio.to_thread(expect, size)
            seen.append(load.bytes)
        with pytest.raises(Overloaded):
            await asyncio.to_thread(expect, 60_000)
        await send_bytes(70_000)(scope, receive, send)
        seen.append(load.bytes)

    async def scenario() -> int | None:
        start("id")
        limits = RequestLimits(read, settings, load)
        return (await _call(limits, [chunk(10, more=False)]))[0]

    assert asyncio.run(scenario()) == 200
    assert seen == [90_010, 40_010, 10 + len(letters(70_000))]
    assert load.bytes == 0


def test_a_thread_that_reads_for_a_request_that_is_over_reads_no_more():
    settings = Settings(request_timeout_s=0.02)
    load, expect = Load(settings), []

    async def slow(scope, receive, send) -> None:
        expect.append(notes().expect)
        notes().expect(50)
        await asyncio.Event().wait()

    async def scenario() -> int | None:
        start("id")
        return (await _call(RequestLimits(slow, settings, load), [chunk(10, more=False)]))[0]

    assert asyncio.run(scenario()) == 504
    with pytest.raises(ClientGone):
        expect[0](100)
    assert load.bytes == 0


def test_a_client_that_leaves_cancels_its_route():
    cancelled = []

    async def slow(scope, receive, send) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(True)

    messages = [chunk(1, more=False), {"type": "http.disconnect"}]
    status, body, _ = call(slow, messages)
    assert (status, body, cancelled) == (None, b"", [True])


def test_a_client_that_leaves_within_its_body_reaches_no_route():
    status, _, _ = call(echo_size, [chunk(1), {"type": "http.disconnect"}])
    assert status is None


def test_an_exception_of_the_route_passes_through():
    async def broken(scope, receive, send) -> None:
        raise TimeoutError("of the route's own")

    with pytest.raises(TimeoutError, match="of the route's own"):
        call(broken, [chunk(1, more=False)])


def test_too_many_requests_or_bytes_get_429_but_health_answers():
    async def scenario() -> list[int]:
        release = asyncio.Event()

        async def wait(scope, receive, send) -> None:
            if not scope["path"].startswith("/health"):
                await release.wait()
            await echo_size(scope, receive, send)

        settings = Settings(max_requests=2, max_inflight_bytes=150)
        limits = RequestLimits(wait, settings)
        first = asyncio.ensure_future(_call(limits, [chunk(100, more=False)]))
        await asyncio.sleep(0)
        statuses = [(await _call(limits, [chunk(100, more=False)]))[0]]
        second = asyncio.ensure_future(_call(limits, [chunk(1, more=False)]))
        await asyncio.sleep(0)
        statuses.append((await _call(limits, [chunk(1, more=False)]))[0])
        statuses.append((await _call(limits, [chunk(1, more=False)], path="/health"))[0])
        release.set()
        statuses += [(await first)[0], (await second)[0]]
        statuses.append((await _call(limits, [chunk(100, more=False)]))[0])
        return statuses

    assert asyncio.run(scenario()) == [429, 429, 200, 200, 200, 200]


@pytest.mark.parametrize("headers", [{"Content-Length": "9"}, {"Transfer-Encoding": "chunked"}])
@pytest.mark.parametrize("path", ["/", "/health/live", "/docs", "/ui/app.js"])
def test_what_needs_no_key_waits_for_no_body(path: str, headers: dict[str, str]):
    limits = RequestLimits(echo_size, Settings())
    status, body, left = asyncio.run(_call(limits, [chunk(1), NEVER], headers, path))
    assert (status, code(body), len(left)) == (413, "body_too_large", 2)


def test_what_needs_no_key_takes_nobodys_place():
    async def scenario() -> tuple:
        release = asyncio.Event()

        async def wait(scope, receive, send) -> None:
            await release.wait()
            await send_bytes(200_000)(scope, receive, send)

        settings = Settings(max_requests=1, max_inflight_bytes=1_000_000)
        load = Load(settings)
        limits = RequestLimits(wait, settings, load)
        calls = [_call(limits, [chunk(0, more=False)], path="/docs") for _ in range(9)]
        calls.append(_call(limits, [chunk(0, more=False)]))
        running = [asyncio.ensure_future(one) for one in calls]
        await asyncio.sleep(0)
        held = load.requests, load.bytes
        release.set()
        return held, {(await one)[0] for one in running}

    assert asyncio.run(scenario()) == ((1, 0), {200})


def send_bytes(size: int) -> Callable:
    """An app whose answer has so many different bytes."""

    async def app(scope, receive, send) -> None:
        await PlainTextResponse(letters(size))(scope, receive, send)

    return app


def letters(size: int) -> bytes:
    return bytes(range(97, 122)) * (size // 25 + 1)


class SlowReader:
    """A connection over which an answer goes a message at a time."""

    def __init__(self, limits: RequestLimits) -> None:
        self.sent: Messages = []
        self._may_send = asyncio.Semaphore(0)
        self._body = [chunk(0, more=False)]
        scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": []}
        self.served = asyncio.ensure_future(limits(scope, self._receive, self._send))

    async def read(self) -> None:
        """Until one message more has arrived, or there is none."""
        count = len(self.sent)
        self._may_send.release()
        while len(self.sent) == count and not self.served.done():
            await asyncio.sleep(0)

    async def _receive(self) -> dict:
        if not self._body:
            await asyncio.Event().wait()
        return self._body.pop()

    async def _send(self, message: dict) -> None:
        await self._may_send.acquire()
        self.sent.append(message)


def test_a_large_answer_keeps_its_place_until_it_is_read():
    async def scenario() -> tuple:
        settings = Settings(max_inflight_bytes=250_000)
        load = Load(settings)
        limits = RequestLimits(send_bytes(200_000), settings, load)
        reader = SlowReader(limits)
        held = []
        while not reader.served.done():
            await reader.read()
            held.append((load.requests, load.bytes))
            if len(held) == 2:
                refused = await _call(limits, [chunk(0, more=False)])
        return reader.sent, held, refused, (load.requests, load.bytes)

    sent, held, (status, body, _), left = asyncio.run(scenario())
    assert b"".join(message.get("body", b"") for message in sent) == letters(200_000)
    assert max(len(message.get("body", b"")) for message in sent) <= 64 * 2**10
    assert [message.get("more_body", False) for message in sent[1:]] == [True] * 4 + [False]
    assert held[:5] == [(1, len(letters(200_000)))] * 5
    assert (status, code(body)) == (429, "overloaded")
    assert left == (0, 0)


@pytest.mark.parametrize(("least", "is_whole"), [(1, True), (10**6, False)])
def test_an_answer_goes_out_as_long_as_enough_of_it_is_read(monkeypatch, least, is_whole):
    async def scenario() -> Messages:
        reader = SlowReader(RequestLimits(send_bytes(200_000), Settings(request_timeout_s=0.06)))
        while not reader.served.done():
            await asyncio.sleep(0.03)
            await reader.read()
        await reader.served
        return reader.sent

    monkeypatch.setattr("service.limits._LEAST_BYTES", least)
    sent = asyncio.run(scenario())
    read = b"".join(message.get("body", b"") for message in sent)
    assert (read == letters(200_000)) == is_whole
    assert len(read) > 0


def test_the_metrics_are_answered_however_much_is_in_flight():
    async def scenario() -> list[int]:
        settings = Settings(max_inflight_bytes=10)
        load = Load(settings)
        load.add(10)
        limits = RequestLimits(send_bytes(200_000), settings, load)
        paths = ("/metrics", "/v1/models", "/metrics")
        return [(await _call(limits, [chunk(0, more=False)], path=path))[0] for path in paths]

    assert asyncio.run(scenario()) == [200, 429, 200]


def test_a_small_answer_needs_no_room():
    settings = {"max_inflight_bytes": 1}
    assert call(send_bytes(50_000), [chunk(0, more=False)], **settings)[0] == 200
    assert call(send_bytes(70_000), [chunk(0, more=False)], **settings)[0] == 429
