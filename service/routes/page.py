"""GET /: the web page and its three files, with a policy that lets it load nothing else."""

import hashlib
from importlib import resources

from fastapi import APIRouter, Request
from starlette.responses import Response

router = APIRouter(include_in_schema=False)

_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:;"
    " connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)


@router.get("/")
async def page(request: Request) -> Response:
    """The web page."""
    return _send(request, "index.html")


@router.get("/ui/style.css")
async def style(request: Request) -> Response:
    return _send(request, "style.css")


@router.get("/ui/app.js")
async def script(request: Request) -> Response:
    return _send(request, "app.js")


@router.get("/ui/icon.svg")
async def icon(request: Request) -> Response:
    return _send(request, "icon.svg")


def _send(request: Request, name: str) -> Response:
    content = resources.files("service.ui").joinpath(name).read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {
        "ETag": etag,
        "Cache-Control": "no-cache",
        "Content-Security-Policy": _POLICY,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=_TYPES[name])
