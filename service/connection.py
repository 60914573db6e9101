"""One connection of a client: uvicorn's, with bounds on what it may hold without a request.

The parser is that of httptools, which takes less of the event loop than h11, in Python, does. It
bounds nothing by itself, so what is not body is counted here.
"""

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.settings import Settings

_NO_REQUEST = "Invalid HTTP request received."
_HEADERS_AND_MORE = 2
"""headers that are somewhat too large get the service's own answer; those that come in pieces and
have so many times the limit do not"""
_WAITING_BYTES = 2**20
"""of the body of a request that waits; with more it is not kept"""


class Connection(HttpToolsProtocol):
    """Closes itself when it is one too many, or waits too long for a whole request, or for the
    client to read, or brings more beside the body of a request than headers may be.

    uvicorn has a limit for the time between requests, but none for a first one that never comes,
    nor for one that comes a byte a minute, nor for a body that goes on when it was refused already,
    nor for an answer that nobody takes; nor for the size of headers, chunk extensions and trailers.
    Of requests that are sent before others are answered one waits, unless it is large; what comes
    after it is not read, and the connection is closed after its answer, which tells the client to
    send the rest again (RFC 9112, 9.3.2).
    """

    idle_timeout_s: float
    max_connections: int
    max_headers: int
    max_framing_bytes: int
    _timer: asyncio.TimerHandle | None = None
    _framing = 0
    """bytes that came since a request began, or since there was something of its body"""
    _in_headers = False
    _is_deaf = False
    """it came to what is not read"""
    _before: RequestResponseCycle | None = None
    """of a request that was being answered when the last one came"""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
        else:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._before is not None and not self._before.response_complete:
            self._before.disconnected = True
            self._before.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._framing += len(data)
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response(_NO_REQUEST)
        if self._framing > self.max_framing_bytes and not self.transport.is_closing():
            self.send_400_response(_NO_REQUEST)

    def _feed(self, data: bytes) -> None:
        """HttpParserError for what is no request."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stopped:
            if not self._is_deaf:
                head = self._plain_head()
                self.parser = httptools.HttpRequestParser(self)  # that one may have come to its end
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self._feed(head + data[stopped.args[0] :])

    def _plain_head(self) -> bytes:
        """Of a request that asks for another protocol, as if it had not asked: of that one the
        parser skips the body."""
        method = self.parser.get_method()
        if method == b"CONNECT" or len(self.headers) > self.max_headers:
            raise httptools.HttpParserError
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (method, self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        if self.pipeline:
            self._hear_no_more()
            return
        self._before = None if self._is_idle() else self.cycle
        self._framing, self._in_headers = 0, True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._is_deaf:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Not of the trailers, nor of more than the service refuses."""
        if self._in_headers and len(self.headers) <= self.max_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if not self._is_deaf and not self.parser.should_upgrade():
            self._in_headers = False
            super().on_headers_complete()
            self._listen_on()

    def on_body(self, body: bytes) -> None:
        if self._is_deaf:
            return
        self._framing = 0
        if self.pipeline and len(self.cycle.body) + len(body) > _WAITING_BYTES:
            self._forget_waiting()
        else:
            super().on_body(body)
            self._listen_on()

    def on_message_complete(self) -> None:
        if not self._is_deaf and not self._in_headers:
            super().on_message_complete()
            if not self.parser.should_keep_alive():  # which trailers may say as well
                self._hear_no_more()

    def send_400_response(self, msg: str) -> None:
        """If it can be understood: not in the place, or in the midst, of another answer."""
        self.logger.info("not HTTP: a request that cannot be read, or headers without end")
        if self._is_idle():
            super().send_400_response(msg)
        elif not self.cycle.more_body:
            self._hear_no_more()
        elif self._before is None and not self.cycle.response_started:
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._wait()

    def _listen_on(self) -> None:
        """uvicorn does not while a request waits, and would not see that the client left."""
        if self.pipeline:
            self.flow.resume_reading()

    def _forget_waiting(self) -> None:
        self.pipeline.clear()
        assert self._before is not None
        self.cycle, self._before = self._before, None
        self._hear_no_more()

    def _hear_no_more(self) -> None:
        """What comes is dropped; the connection ends with the last answer."""
        self._is_deaf = True
        self.cycle.keep_alive = False
        if self.cycle.response_complete:
            self.transport.close()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(self.idle_timeout_s, self._close_if_stuck)

    def _close_if_stuck(self) -> None:
        """Unless a request is being served, whose time is the application's."""
        if self._is_idle() or self.flow.write_paused:
            self.transport.abort()


def connections(settings: Settings) -> Any:
    """The class for uvicorn to make them of."""
    limits = {
        "idle_timeout_s": settings.body_timeout_s,
        "max_connections": settings.max_connections,
        "max_headers": settings.max_headers,
        "max_framing_bytes": _HEADERS_AND_MORE * settings.max_header_bytes,
    }
    return type("Connection", (Connection,), limits)
