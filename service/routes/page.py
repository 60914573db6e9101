"""GET /: the web page and its files, with a policy that lets it load nothing else.

The files are those of `service.ui`, by a fixed list: a name from outside leads to no other.
"""

import functools
import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePath

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.errors import NotFound

router = APIRouter(include_in_schema=False)

_PAGE = "index.html"
_FILES = (
    *("icon.svg", "style.css", "views.css"),
    *("api.js", "app.js", "charts.js", "classify.js", "collections.js", "dom.js", "filters.js"),
    *("format.js", "hits.js", "jobs.js", "keyboard.js", "manage.js", "metrics.js", "pictures.js"),
    *("query.js", "records.js", "search.js", "sending.js", "service.js", "status.js", "theme.js"),
)
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# `trusted-types` makes a rule of what the scripts keep to: text never becomes markup or code.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:;"
    " connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Cache-Control": "no-cache",  # kept, and asked for again by its ETag
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True)
class _File:
    content: bytes
    etag: str
    media_type: str


@router.head("/")
@router.get("/")
async def page(request: Request) -> Response:
    """The web page."""
    return _send(request, _PAGE)


@router.get("/ui/{name}")
async def file(name: str, request: Request) -> Response:
    """One of the page's files."""
    if name not in _FILES:
        raise NotFound("the page has no such file")
    return _send(request, name)


def _send(request: Request, name: str) -> Response:
    found = _read(name)
    headers = {"ETag": found.etag, **_HEADERS}
    if request.headers.get("if-none-match") == found.etag:
        return Response(status_code=304, headers=headers)
    return Response(found.content, headers=headers, media_type=found.media_type)


@functools.cache
def _read(name: str) -> _File:
    content = resources.files("service.ui").joinpath(name).read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return _File(content, etag, _TYPES[PurePath(name).suffix])
