"""GET /openapi.json, and /docs, a page to read it: no script, nothing from elsewhere.

Anyone may ask for them, as often as they like, so both are made once.
"""

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from service.replies import to_json

router = APIRouter(include_in_schema=False)

_METHODS = ("get", "put", "post", "delete")
_NULL = {"type": "null"}
_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; }
h2 { margin-top: 2.5rem; }
summary { padding: 0.4rem 0; cursor: pointer; overflow-wrap: anywhere; }
details { border-top: 1px solid #8886; }
details > :not(summary) { margin-inline-start: 1rem; }
code { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
.method { display: inline-block; min-width: 4.5rem; font-weight: 600; }
dt { margin-top: 0.5rem; }
dd { margin-inline-start: 1.5rem; }
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; form-action 'none';"
        " base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True)
class _Made:
    """Both, below a path at which the service is mounted in another one."""

    root_path: str
    page: bytes
    schema: bytes


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Every route, its values and their meaning."""
    return HTMLResponse(_made(request).page, headers=_HEADERS)


async def openapi(request: Request) -> Response:
    """The same for programs."""
    return Response(_made(request).schema, media_type="application/json")


router.add_route("/openapi.json", openapi)


def _made(request: Request) -> _Made:
    state, root_path = request.app.state, request.scope.get("root_path", "").rstrip("/")
    made: _Made | None = getattr(state, "documents", None)
    if made is None or made.root_path != root_path:
        schema = request.app.openapi()
        page = write_page(schema).encode()
        if root_path:
            schema = {**schema, "servers": [{"url": root_path}]}
        made = state.documents = _Made(root_path, page, to_json(schema))
    return made


def write_page(schema: Mapping[str, Any]) -> str:
    """The page, from an OpenAPI document."""
    groups: dict[str, list[str]] = {}
    for path, ways in schema["paths"].items():
        for method in _METHODS:
            if method in ways:
                route = ways[method]
                section = "".join(_route(method, path, route, schema))
                groups.setdefault(route.get("tags", ["other"])[0], []).append(section)
    groups["objects"] = list(_objects(schema))
    links = " ".join(f'<a href="#{escape(tag)}">{escape(tag)}</a>' for tag in groups)
    sections = "".join(
        f'<section aria-labelledby="{escape(tag)}"><h2 id="{escape(tag)}">{escape(tag)}</h2>'
        f"{''.join(routes)}</section>"
        for tag, routes in groups.items()
    )
    info = schema["info"]
    title = escape(f"{info['title']} {info['version']}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main><h1>{title}</h1>"
        f"<p>{_text(info.get('description', ''))} The same for programs:"
        f' <a href="openapi.json">openapi.json</a>.</p><nav aria-label="Groups">{links}</nav>'
        f"{sections}</main></body></html>"
    )


def _route(
    method: str, path: str, route: Mapping[str, Any], schema: Mapping[str, Any]
) -> Iterator[str]:
    first, _, rest = route.get("description", "").partition("\n\n")
    yield (
        f'<details><summary><code><span class="method">{method.upper()}</span> {escape(path)}'
        f"</code> {_text(first)}</summary>"
    )
    yield "".join(f"<p>{_text(part)}</p>" for part in rest.split("\n\n") if part)
    parameters = {one["name"]: one["schema"] for one in route.get("parameters", ())}
    needed = [one["name"] for one in route.get("parameters", ()) if one.get("required")]
    yield _fields("In the address", {"properties": parameters, "required": needed})
    content = route.get("requestBody", {}).get("content", {})
    if content:
        yield f"<p>Body: {', '.join(f'<code>{escape(kind)}</code>' for kind in content)}</p>"
    if "application/json" in content:
        body = _resolve(content["application/json"]["schema"], schema)
        yield f"<p>{_text(body.get('description', ''))}</p>"
        yield _fields("Fields", body)
    yield "</details>"


def _objects(schema: Mapping[str, Any]) -> Iterator[str]:
    """What fields of a body hold."""
    for name, body in schema["components"]["schemas"].items():
        if name.endswith("Request"):
            continue
        yield f"<details><summary><code>{escape(name)}</code> {_text(body.get('description', ''))}"
        yield f"</summary>{_fields('Fields', body)}</details>"


def _fields(title: str, body: Mapping[str, Any]) -> str:
    rows = []
    for name, field in body.get("properties", {}).items():
        about = [_type(field)]
        if name in body.get("required", ()):
            about.append("required")
        elif field.get("default") is not None:
            about.append(f"default {field['default']!r}")
        rows.append(
            f"<dt><code>{escape(name)}</code> {escape(', '.join(about))}</dt>"
            f"<dd>{_text(field.get('description', ''))}</dd>"
        )
    return f"<h3>{title}</h3><dl>{''.join(rows)}</dl>" if rows else ""


def _type(field: Mapping[str, Any]) -> str:
    """In words: "string or list of strings"."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(one) for one in field["anyOf"] if one != _NULL))
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "$ref" in field:
        return _name(field)
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("const", field.get("type", "any")))


def _resolve(body: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = body
    if "$ref" in body:
        found = schema["components"]["schemas"][_name(body)]
    return found


def _name(reference: Mapping[str, Any]) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _text(text: str) -> str:
    return re.sub(r"`+([^`]+)`+", r"<code>\1</code>", escape(text))
