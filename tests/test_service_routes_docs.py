"""GET /docs; and that no page of the service needs another address."""

import base64
import hashlib
import re

import pytest
from fastapi import FastAPI
from served import World
from starlette.testclient import TestClient

from service.routes.docs import write_page

NAMESPACES = {"http://www.w3.org/2000/svg"}
"""names, which nobody asks for"""


@pytest.fixture
def page(world: World) -> str:
    answer = world.client.get("/docs")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    return answer.text


def test_every_route_and_every_field_of_its_body_is_shown(world: World, page: str):
    schema = world.client.get("/openapi.json").json()
    for path, ways in schema["paths"].items():
        for method in ways:
            assert f'<span class="method">{method.upper()}</span> {path}</code>' in page
    shown = set(re.findall(r"<dt><code>([^<]+)</code>", page))
    for body in schema["components"]["schemas"].values():
        assert set(body.get("properties", {})) <= shown
    assert "float | base64 | binary | ubinary" in page
    assert "list of WeightedPart" in page


def test_both_are_made_once(own_world: World, monkeypatch: pytest.MonkeyPatch):
    answers = [own_world.client.get(path) for path in ("/docs", "/openapi.json")]
    assert answers[1].json() == own_world.app.openapi()
    monkeypatch.setattr("service.routes.docs.write_page", None)
    monkeypatch.setattr(own_world.app, "openapi", None)
    for answer in answers:
        again = own_world.client.get(answer.url.path)
        assert (again.status_code, again.content) == (200, answer.content)
        assert again.headers["content-type"] == answer.headers["content-type"]
    assert own_world.client.head("/openapi.json").status_code == 200


def test_a_service_below_a_path_of_another_names_it(own_world: World):
    outer = FastAPI()
    outer.mount("/below", own_world.app)
    with TestClient(outer, base_url="http://localhost") as client:
        assert client.get("/below/openapi.json").json()["servers"] == [{"url": "/below"}]
    assert "servers" not in own_world.client.get("/openapi.json").json()


def test_it_may_load_nothing_but_its_own_style(world: World, page: str):
    policy = world.client.get("/docs").headers["content-security-policy"]
    style = re.search("<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}';")
    assert "<script" not in page
    assert 'style="' not in page


def test_no_page_names_an_outside_address(world: World, page: str):
    main = world.client.get("/").text
    names = set(re.findall(r'(?:src|href)="(/?ui/[^"]+)"', main))
    scripts = {name: world.client.get(f"/{name.lstrip('/')}").text for name in names}
    imported = {
        f"ui/{name}"
        for text in scripts.values()
        for name in re.findall(r'from "\./([a-z]+\.js)"', text)
    }
    scripts |= {name: world.client.get(f"/{name}").text for name in imported}
    assert len(scripts) > 5
    for text in (page, main, *scripts.values()):
        assert set(re.findall(r"https?://\w[^\s\"'`)<]+", text)) <= NAMESPACES
        assert not re.search(r"""(?:src|href|url\(|import|from)\s*=?\s*["'(]\s*//""", text)


def test_what_a_document_says_cannot_become_markup():
    route = {"description": "<script>x</script> `a<b`", "tags": ['"><b>']}
    schema = {
        "info": {"title": "<t>", "version": "1"},
        "paths": {"/<p>": {"get": route}},
        "components": {"schemas": {"<o>": {"description": "<d>"}}},
    }
    text = write_page(schema)
    for mark in ("<script>", "<t>", "<p>/", "<b>", "<o>", "<d>"):
        assert mark not in text
    assert "<code>a&lt;b</code>" in text
