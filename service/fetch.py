"""Pictures behind URLs that clients send: off by default, and never a way into the network here.

An address is taken apart once (`addresses.py`). Its name is resolved once, every number it has must
be public, and the connection goes to a number that was checked, so a name that changes its mind in
between gains nothing; TLS still checks the name. Redirects start over. Whatever goes wrong, the
client is told the same. Built on httpcore, httpx's own transport, which reads no proxy from the
environment, follows nothing and unpacks nothing by itself. Start at `Fetcher.get`.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpcore
import httpx
from httpcore import SOCKET_OPTION, AsyncNetworkBackend, AsyncNetworkStream

from service.addresses import Address, is_public, is_within, parse_address
from service.errors import RequestError
from service.notes import notes
from service.settings import Settings

logger = logging.getLogger(__name__)

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""host and port -> numeric addresses"""

_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = [
    (b"user-agent", b"clipserve"),
    (b"accept", b"image/*"),
    (b"accept-encoding", b"identity"),
]
_FIRST_BYTES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
_KNOWN_FROM_BYTES = 12
_MAX_NUMBERS = 4
"""addresses of one name that are tried"""
_FAILURES = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError)


class Fetcher:
    """Fetches within the settings' limits.

    `allowed` adds networks, such as a test's loopback, to the public ones; `resolve` and
    `ssl_context` stand for the system's own.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        allowed: tuple[str, ...] = (),
        resolve: Resolve | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._settings = settings
        self._slots = asyncio.Semaphore(settings.fetch_connections)
        # Its own: a name server that hangs would use up the threads of others.
        self._resolvers = ThreadPoolExecutor(settings.fetch_connections, "resolve")
        self._backend = _CheckedBackend(resolve or self._resolve, allowed)
        self._ssl_context = ssl_context

    async def get(self, url: str, param: str) -> bytes:
        """The bytes of a picture. RequestError, naming `param`, says no more than that."""
        address = parse_address(url)
        if address is None or not self._may_ask(address):
            ports = ", ".join(map(str, self._settings.fetch_ports))
            raise RequestError(
                f"{param} is not a URL that is fetched here: http or https, port {ports}, a host"
                " that is allowed, without user name, backslash, blanks or letters beyond ASCII",
                param=param,
                code="url_not_allowed",
            )
        try:
            async with self._slots, asyncio.timeout(self._settings.fetch_timeout_s):
                return await self._follow(address)
        except (_Refused, TimeoutError, *_FAILURES) as error:
            logger.info("a picture was not fetched: %s", type(error).__name__)
            raise RequestError(
                f"no picture could be fetched from the URL at {param}",
                param=param,
                code="fetch_failed",
            ) from None

    def close(self) -> None:
        """Ask for no more names, and wait for those that are being looked up."""
        self._resolvers.shutdown(cancel_futures=True)

    async def _resolve(self, host: str, port: int) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._resolvers, _resolve, host, port)

    async def _follow(self, address: Address) -> bytes:
        for _ in range(self._settings.fetch_max_redirects + 1):
            answer = await self._ask(address)
            if isinstance(answer, bytes):
                return answer
            target = address.joined(answer)
            if target is None or not self._may_ask(target):
                raise _Refused
            address = target
        raise _Refused

    def _may_ask(self, address: Address) -> bool:
        """By the settings; the numbers behind the name are checked when it is connected to."""
        hosts = self._settings.fetch_hosts
        return address.port in self._settings.fetch_ports and (
            not hosts or any(_matches(address.host, host.lower()) for host in hosts)
        )

    async def _ask(self, address: Address) -> bytes | str:
        """A picture, or where a redirect leads, over a connection of its own."""
        url = httpcore.URL(
            scheme=address.scheme.encode(),
            host=address.host.encode(),
            port=address.port,
            target=address.target.encode(),
        )
        headers = [(b"host", _host_header(address)), *_HEADERS]
        timeout = self._settings.fetch_timeout_s
        extensions = {"timeout": {"connect": timeout, "read": timeout, "write": timeout}}
        tls = self._tls() if address.scheme == "https" else None
        async with (
            httpcore.AsyncConnectionPool(tls, network_backend=self._backend) as pool,
            pool.stream("GET", url, headers=headers, extensions=extensions) as response,
        ):
            received = {name.lower(): value for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in received:
                return received[b"location"].decode("latin-1")
            is_packed = received.get(b"content-encoding", b"identity").lower() != b"identity"
            if response.status != 200 or is_packed:
                raise _Refused
            return await self._read(response.aiter_stream())

    async def _read(self, chunks: Any) -> bytes:
        data = bytearray()
        async for chunk in chunks:
            notes().hold(len(chunk))
            data += chunk
            is_known = len(data) >= _KNOWN_FROM_BYTES
            if len(data) > self._settings.max_image_bytes or (is_known and not _is_picture(data)):
                raise _Refused
        if not _is_picture(data):
            raise _Refused
        return bytes(data)

    def _tls(self) -> ssl.SSLContext:
        if self._ssl_context is None:  # made when it is first needed: it reads all certificates
            self._ssl_context = httpx.create_ssl_context()
        return self._ssl_context


class _CheckedBackend(AsyncNetworkBackend):
    """Connects to addresses that were checked, whatever the name says a moment later."""

    def __init__(self, resolve: Resolve, allowed: tuple[str, ...]) -> None:
        self._resolve = resolve
        self._allowed = allowed
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[SOCKET_OPTION] | None = None,
    ) -> AsyncNetworkStream:
        numbers = await self._resolve(host, port)
        # One that is not public condemns the name: an honest one has no such numbers.
        if not numbers or not all(self._is_allowed(number) for number in numbers):
            raise _Refused
        for number in numbers[:_MAX_NUMBERS]:
            try:
                return await self._network.connect_tcp(number, port, timeout)
            except (httpcore.NetworkError, httpcore.TimeoutException):
                continue
        raise _Refused

    def _is_allowed(self, number: str) -> bool:
        return is_public(number) or is_within(number, self._allowed)


class _Refused(Exception):
    """Something that is not fetched; nobody is told why."""


def _resolve(host: str, port: int) -> Sequence[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:  # of a name that no name server could be asked for
        raise _Refused from None
    return [str(item[4][0]) for item in found]


def _matches(host: str, allowed: str) -> bool:
    """`.example.org` stands for every name below example.org."""
    return host.endswith(allowed) if allowed.startswith(".") else host == allowed


def _host_header(address: Address) -> bytes:
    host = f"[{address.host}]" if ":" in address.host else address.host
    usual = 443 if address.scheme == "https" else 80
    return (host if address.port == usual else f"{host}:{address.port}").encode()


def _is_picture(data: bytearray) -> bool:
    return data.startswith(_FIRST_BYTES) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
