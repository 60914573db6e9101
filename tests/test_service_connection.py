"""Connections on a real socket: what they may hold, and how long, without a request."""

import contextlib
import socket
import time

import httpx
import pytest
from listening import LARGE, WAIT_S, Running, is_closed, serving


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


POST = b"POST /v1/echo HTTP/1.1\r\nHost: x\r\n"
QUICK = b"GET /v1/quick HTTP/1.1\r\nHost: x\r\n\r\n"
SLOW = b"GET /v1/slow HTTP/1.1\r\nHost: x\r\n\r\n"
WAITING = b"GET /v1/waiting/ HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("begin", "on"),
    [
        pytest.param(b"", b"\r\n", id="lines before a request"),
        pytest.param(b"GET /", b"a", id="address"),
        pytest.param(b"GET / HTTP/1.1\r\n", b"name", id="name"),
        pytest.param(b"GET / HTTP/1.1\r\nname: ", b"value", id="value"),
        pytest.param(b"GET / HTTP/1.1\r\n", b"name: value\r\n", id="headers"),
        pytest.param(POST + b"Transfer-Encoding: chunked\r\n\r\n1;", b"x", id="extension"),
        pytest.param(
            POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", b"a: b\r\n", id="trailers"
        ),
        pytest.param(
            POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\na: ", b"b", id="trailer"
        ),
    ],
)
def test_what_never_ends_is_cut_off(running: Running, begin: bytes, on: bytes):
    piece, sent = on * (8192 // len(on)), 0
    with serving(running) as client, running.connect() as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(begin)
            while sent < LARGE:
                connection.sendall(piece)
                sent += len(piece)
        assert is_closed(connection)
        assert sent < LARGE
        assert client.get("/v1/quick").status_code == 200


def test_many_headers_at_once_are_for_the_service_to_refuse(running: Running):
    with serving(running), running.connect() as connection:
        connection.sendall(POST + b"a: b\r\n" * 5000 + b"Content-Length: 0\r\n\r\n")
        assert answer(connection).headers["x-headers"] == str(running.settings.max_headers + 1)


@pytest.mark.parametrize("chunk", [1, 100, 70_000])
def test_a_body_may_come_in_chunks_of_any_size(running: Running, chunk: int):
    body = bytes(range(256)) * 300
    parts = [body[i : i + chunk] for i in range(0, len(body), chunk)]
    sent = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    with serving(running), running.connect() as connection:
        connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n" + sent + b"0\r\n\r\n")
        assert answer(connection).content == body


def test_trailers_are_no_headers(running: Running):
    with serving(running), running.connect() as connection:
        connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n")
        connection.sendall(b"X-API-Key: a\r\n\r\n")
        found = answer(connection)
        assert (found.content, found.headers["x-headers"]) == (b"x", "2")


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_who_asks_for_another_protocol_gets_this_one(
    running: Running, protocol: bytes, caplog: pytest.LogCaptureFixture
):
    wanted = b"Connection: Upgrade\r\nUpgrade: %b\r\nContent-Length: 1\r\n\r\nx" % protocol
    with serving(running), running.connect() as connection:
        for _ in range(2):
            connection.sendall(POST + wanted)
            assert answer(connection).content == b"x"
    assert not caplog.records


def test_a_request_sent_before_the_answer_waits_and_the_next_is_not_read(running: Running):
    with serving(running), running.connect() as connection:
        connection.sendall(SLOW)
        assert running.asked.wait(WAIT_S)
        connection.sendall(POST + b"Content-Length: 1\r\n\r\nx" + QUICK + QUICK)
        connection.sendall(b"and what is no request")
        running.may_answer.set()
        assert answer(connection).json() == "done"
        assert answer(connection).content == b"x"
        assert connection.recv(1) == b""


def test_what_is_no_request_does_not_stop_the_answer_to_one(running: Running):
    with serving(running), running.connect() as connection:
        connection.sendall(SLOW + b"what is no request\r\n\r\n")
        assert running.asked.wait(WAIT_S)
        running.may_answer.set()
        assert answer(connection).json() == "done"
        assert connection.recv(1) == b""


def test_a_body_that_breaks_off_in_nonsense_is_refused(running: Running):
    with serving(running), running.connect() as connection:
        connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\nnonsense\r\n")
        assert answer(connection).status_code == 400
        assert is_closed(connection)


@pytest.mark.parametrize(
    "more", [b"", QUICK, POST + b"Content-Length: 500000\r\n\r\n" + bytes(200_000)]
)
@pytest.mark.parametrize("is_later", [False, True])
def test_a_request_sees_that_its_client_left(running: Running, more: bytes, is_later: bool):
    with serving(running):
        with running.connect() as connection:
            connection.sendall(WAITING + (b"" if is_later else more))
            assert running.asked.wait(WAIT_S)
            connection.sendall(more if is_later else b"")
        assert running.left.wait(WAIT_S)


def test_a_large_request_that_would_wait_is_not_kept(running: Running):
    with serving(running), running.connect() as connection:
        connection.sendall(SLOW)
        assert running.asked.wait(WAIT_S)
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % LARGE + bytes(LARGE) + QUICK)
        running.may_answer.set()
        assert answer(connection).json() == "done"
        assert connection.recv(1) == b""


def test_a_request_that_waited_gets_the_rest_of_its_body(running: Running):
    body = bytes(range(256)) * 3000
    with serving(running), running.connect() as connection:
        connection.sendall(SLOW)
        assert running.asked.wait(WAIT_S)
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body[:200_000])
        time.sleep(0.1)
        running.may_answer.set()
        assert answer(connection).json() == "done"
        connection.sendall(body[200_000:])
        assert answer(connection).content == body


@pytest.mark.parametrize(
    "line",
    [
        b"GET /v1/quick HTTP/1.0\r\nConnection: upgrade",
        b"GET /v1/quick HTTP/1.1\r\nConnection: upgrade, close",
    ],
)
def test_who_asks_for_another_protocol_once_gets_this_one_once(running: Running, line: bytes):
    with serving(running), running.connect() as connection:
        connection.sendall(line + b"\r\nHost: x\r\nUpgrade: h2c\r\n\r\n")
        assert answer(connection).json() == "done"
        assert connection.recv(1) == b""


@pytest.mark.parametrize("more", [b"", QUICK])
def test_a_trailer_may_end_the_connection(running: Running, more: bytes):
    trailer = b"1\r\nx\r\n0\r\nConnection: close\r\n\r\n"
    with serving(running), running.connect() as connection:
        connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n" + trailer + more)
        found = answer(connection)
        assert (found.content, found.headers["connection"]) == (b"x", "close")
        assert connection.recv(1) == b""


def answer(connection: socket.socket) -> httpx.Response:
    """The next one; its length must be announced."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += (byte := connection.recv(1))
        assert byte, f"closed after {head!r}"
    lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    body = b""
    while len(body) < int(headers["content-length"]):
        body += connection.recv(int(headers["content-length"]) - len(body))
    return httpx.Response(int(lines[0].split()[1]), headers=headers, content=body)
