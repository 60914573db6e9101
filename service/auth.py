"""Who may ask for what, and how often.

`Authenticate` is ASGI middleware, for a route would be asked only after its body was read;
`require` is what routes of a higher scope ask. `check_exposure` keeps a service without keys to
this machine, `Browsers` to its own pages.
"""

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urlsplit

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from clipserve.errors import ConfigError
from service.errors import Forbidden, RequestError, Unauthorized, error_response
from service.keys import Key, Keys, KeyScope
from service.notes import notes
from service.rate import RateLimit
from service.settings import Settings

OPEN_PATHS = (
    *("/", "/docs", "/openapi.json", "/health", "/health/live", "/health/ready"),
    *("/.well-known/live", "/.well-known/ready"),
)
"""what needs no key, beside the page's files; it tells nothing of what is served"""
_OPEN_FOLDER = "/ui/"
_READING = ("GET", "HEAD", "OPTIONS")
_KEY = "clipserve.key"


class Authenticate:
    """Lets a request in that has a key, or needs none, and comes not too often."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys | None,
        rate: RateLimit,
        browsers: "Browsers | None" = None,
    ) -> None:
        self._app = app
        self._keys = keys
        self._rate = rate
        self._browsers = browsers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["type"] == "http" and not is_open(scope["path"]):
                self._admit(scope)
        except RequestError as error:
            await error_response(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        key = None
        if self._keys is not None:
            key = self._keys.find(_sent_token(scope["headers"]))
            if key is None:
                raise Unauthorized(
                    "this service needs an API key it knows: Authorization: Bearer KEY, or"
                    " X-API-Key: KEY"
                )
            scope[_KEY] = key
            notes().key = key.name
        elif self._browsers is not None:
            self._browsers.check(scope)
        self._rate.take(key.id if key else client_address(scope))


class Browsers:
    """Keeps pages of other sites away from a service without keys, which a browser that runs beside
    it can reach: by a name that they make point here, or by a request that needs no permission."""

    def __init__(self, settings: Settings) -> None:
        self._own_host = settings.host.lower()
        self._origins = settings.cors_origins
        self._is_local = not settings.insecure and _is_loopback(settings.host)

    def check(self, scope: Scope) -> None:
        """Forbidden for a host that is not this machine, and a change from another origin."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._is_local and host and not self._is_own(host):
            raise Forbidden(
                "this service has no keys and answers to names of this machine alone; ask for"
                " localhost, or give it keys with CLIPSERVE_API_KEYS_FILE",
                code="foreign_host",
            )
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if scope["method"] in _READING or not origin or self._allows(origin):
            return
        if origin.partition("://")[2] != host:
            raise Forbidden(
                "a page of another origin may change nothing here; name it in"
                " CLIPSERVE_CORS_ORIGINS",
                code="foreign_origin",
            )

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in ("localhost", self._own_host) or ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    def _allows(self, origin: str) -> bool:
        return "*" in self._origins or origin in map(str.lower, self._origins)


def require(scope: KeyScope) -> Callable[[Request], Awaitable[None]]:
    """A dependency of a route: Forbidden unless the key's scope is at least this one."""

    async def check(request: Request) -> None:
        key: Key | None = request.scope.get(_KEY)  # None where the service has no keys
        if key is not None and not key.allows(scope):
            raise Forbidden(
                f"this key has the scope {key.scope}; this route needs {scope}",
                code="insufficient_scope",
            )

    return check


def check_exposure(settings: Settings) -> None:
    """ConfigError if others than this machine could come in without a key."""
    if settings.api_keys_file or settings.insecure or _is_loopback(settings.host):
        return
    raise ConfigError(
        f"host {settings.host} lets others in, and there are no API keys; make one with clipserve"
        " keys new --name NAME --file FILE and set CLIPSERVE_API_KEYS_FILE=FILE, or set"
        " CLIPSERVE_INSECURE=1 if something in front of it authenticates"
    )


def is_open(path: str) -> bool:
    """Whether anyone may ask for it."""
    return path in OPEN_PATHS or path.startswith(_OPEN_FOLDER)


def client_address(scope: Scope) -> str:
    """Whom to count a request for: of IPv6 the network, for a client has all of it."""
    host = scope["client"][0] if scope.get("client") else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped is not None:  # how IPv4 comes in where `::` is listened on
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


def _sent_token(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """From either header; Unauthorized unless exactly one key was sent."""
    sent = {value.strip() for name, value in headers if name == b"x-api-key"}
    for name, value in headers:
        if name == b"authorization":
            scheme, _, token = value.strip().partition(b" ")
            sent.add(token.strip() if scheme.lower() == b"bearer" else b"")
    if len(sent) > 1:
        raise Unauthorized("send one API key, not several")
    return sent.pop() if sent else b""


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(ipaddress.ip_address(item[4][0]).is_loopback for item in found)
