"""Keys in a file, scopes, the limit of requests, and what is open; against a bare ASGI app."""

import asyncio
from pathlib import Path

import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from clipserve.errors import ConfigError
from service.auth import Authenticate, Browsers, check_exposure, client_address, require
from service.errors import Forbidden, install_handlers
from service.keys import Keys, add_key, revoke_key
from service.rate import RateLimit
from service.settings import load_settings


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.jsonl"


def client_of(file: Path | None, per_minute: int = 0) -> TestClient:
    app = FastAPI()

    @app.get("/v1/thing")
    async def read() -> str:
        return "read"

    @app.get("/health/live")
    async def live() -> str:
        return "live"

    @app.put("/v1/thing", dependencies=[Depends(require("write"))])
    async def write() -> str:
        return "written"

    @app.delete("/v1/thing", dependencies=[Depends(require("admin"))])
    async def drop() -> str:
        return "dropped"

    install_handlers(app)
    keys = None if file is None else Keys(file)
    app.add_middleware(Authenticate, keys=keys, rate=RateLimit(per_minute))
    return TestClient(app)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_key_lets_in_by_either_header(file: Path):
    key = add_key(file, "someone", "read")
    client = client_of(file)
    for headers in (bearer(key), {"X-API-Key": key}, {"Authorization": f"bearer  {key}"}):
        assert client.get("/v1/thing", headers=headers).json() == "read"


def test_without_its_key_nobody_gets_in(file: Path):
    key = add_key(file, "someone", "admin")
    identity = key.split("_")[1]
    client = client_of(file)
    wrong = [
        {},
        bearer(""),
        bearer(key[:-1]),
        bearer(key + "x"),
        bearer(f"csk_{identity}_"),
        bearer("csk_000000000000_" + key.split("_", 2)[2]),
        bearer("x" * 100_000),
        {"Authorization": f"Basic {key}"},
        {"Authorization": key},
        {"X-API-Key": "\x80\xff".encode("latin-1")},
        {"X-API-Key": key, "Authorization": "Bearer another"},
    ]
    for headers in wrong:
        response = client.get("/v1/thing", headers=headers)
        assert response.status_code == 401, headers
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"


def test_each_scope_may_do_what_those_below_it_may(file: Path):
    keys = {scope: add_key(file, scope, scope) for scope in ("read", "write", "admin")}
    client = client_of(file)
    statuses = {
        scope: [
            client.request(method, "/v1/thing", headers=bearer(key)).status_code
            for method in ("GET", "PUT", "DELETE")
        ]
        for scope, key in keys.items()
    }
    assert statuses == {
        "read": [200, 403, 403],
        "write": [200, 200, 403],
        "admin": [200, 200, 200],
    }
    refused = client.put("/v1/thing", headers=bearer(keys["read"])).json()["error"]
    assert refused["code"] == "insufficient_scope"
    assert "read" in refused["message"]
    assert "write" in refused["message"]


def test_without_keys_everything_is_allowed():
    assert client_of(None).delete("/v1/thing").json() == "dropped"


def test_probes_need_no_key_but_no_other_path_looks_like_one(file: Path):
    add_key(file, "someone", "read")
    client = client_of(file)
    assert client.get("/health/live").status_code == 200
    for path in ("/health/live/../../v1/thing", "//health/live", "/Health/live", "/metrics"):
        assert client.get(path).status_code in (401, 404), path
    assert client.get("/metrics").status_code == 401


def test_a_request_without_a_key_is_refused_before_its_body_is_read(file: Path):
    add_key(file, "someone", "read")
    sent = []

    async def app(scope, receive, send) -> None:
        pytest.fail("reached")

    async def receive() -> dict:
        pytest.fail("the body was read")

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/v1/embeddings", "headers": [], "client": ("1.2.3.4", 5)}
    asyncio.run(Authenticate(app, Keys(file), RateLimit(0))(scope, receive, send))
    assert sent[0]["status"] == 401


def test_the_file_is_read_again_when_it_changes(file: Path):
    first = add_key(file, "first", "read")
    client = client_of(file)
    second = add_key(file, "second", "read")
    assert client.get("/v1/thing", headers=bearer(second)).status_code == 200
    revoke_key(file, first.split("_")[1])
    assert client.get("/v1/thing", headers=bearer(first)).status_code == 401
    assert client.get("/v1/thing", headers=bearer(second)).status_code == 200
    file.unlink()
    assert client.get("/v1/thing", headers=bearer(second)).status_code == 401


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_on_loopback_no_keys_are_needed(host: str):
    check_exposure(load_settings(host=host))


def test_others_are_let_in_with_keys_or_on_request_only(file: Path):
    with pytest.raises(ConfigError, match="CLIPSERVE_INSECURE=1"):
        check_exposure(load_settings(host="0.0.0.0"))
    with pytest.raises(ConfigError, match="clipserve keys new"):
        check_exposure(load_settings(host=""))
    check_exposure(load_settings(host="0.0.0.0", insecure=True))
    check_exposure(load_settings(host="0.0.0.0", api_keys_file=file))


def test_each_key_has_its_own_rate(file: Path):
    one, other = add_key(file, "one", "read"), add_key(file, "other", "read")
    client = client_of(file, per_minute=2)
    statuses = [client.get("/v1/thing", headers=bearer(one)).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    limited = client.get("/v1/thing", headers=bearer(one))
    assert 1 <= int(limited.headers["Retry-After"]) <= 30
    assert limited.json()["error"]["code"] == "rate_limited"
    assert client.get("/v1/thing", headers=bearer(other)).status_code == 200
    assert client.get("/health/live").status_code == 200


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("1.2.3.4", "1.2.3.4"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("::ffff:102:304", "1.2.3.4"),
        ("::1.2.3.4", "::/64"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("testclient", "testclient"),
    ],
)
def test_a_client_is_its_ipv4_address_or_its_ipv6_network(host: str, address: str):
    assert client_address({"client": (host, 1)}) == address


def browsed(
    host: str, origin: str | None = None, method: str = "GET", /, **settings: object
) -> str:
    """The code of the refusal, or nothing."""
    headers = [(b"host", host.encode())]
    headers += [(b"origin", origin.encode())] if origin else []
    try:
        Browsers(load_settings(**settings)).check({"headers": headers, "method": method})
    except Forbidden as refusal:
        return refusal.code or ""
    return ""


OWN = ["localhost:8000", "LOCALHOST", "127.0.0.1:8000", "127.8.9.1", "[::1]:8000"]


@pytest.mark.parametrize("host", OWN)
def test_this_machines_names_are_answered(host: str):
    assert browsed(host) == ""
    assert browsed(host, f"http://{host}", "POST") == ""


@pytest.mark.parametrize(
    "host", ["evil.example:8000", "10.0.0.1", "localhost.evil.example", "[", "x@y"]
)
def test_without_keys_a_name_made_to_point_here_is_not_answered(host: str):
    assert browsed(host) == "foreign_host"
    assert browsed(host, insecure=True) == ""
    assert browsed(host, host="0.0.0.0") == ""


def test_the_name_that_is_bound_is_answered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("service.auth._is_loopback", lambda host: True)
    assert browsed("Workstation:8000", host="workstation") == ""


def test_pages_of_other_origins_change_nothing_unless_allowed():
    for origin in ("http://evil.example", "null", "http://localhost:3000"):
        assert browsed("localhost:8000", origin, "POST") == "foreign_origin"
        assert browsed("localhost:8000", origin, "GET") == ""
    page = "http://localhost:3000"
    assert browsed("localhost:8000", page, "PUT", cors_origins=[page]) == ""
    assert browsed("localhost:8000", page, "DELETE", cors_origins=["*"]) == ""


def test_a_service_with_keys_asks_for_them_alone(file: Path):
    key = add_key(file, "someone", "read")
    app = Starlette(routes=[Route("/x", lambda request: PlainTextResponse("x"))])
    browsers = Browsers(load_settings())
    for keys, status in ((Keys(file), 200), (None, 403)):
        guarded = Authenticate(app, keys, RateLimit(0), browsers)
        answer = TestClient(guarded, base_url="http://evil.example").get("/x", headers=bearer(key))
        assert answer.status_code == status
