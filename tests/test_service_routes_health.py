"""Probes, and that the whole app has its keys, origins and phases where they belong."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import fill
from starlette.testclient import TestClient

import clipserve
from clipserve import checkpoint
from clipserve.model import create
from service.app import create_app
from service.drain import Lifecycle
from service.errors import ModelFailed
from service.keys import add_key
from service.registry import Registry
from service.routes import health
from service.settings import load_settings


@pytest.fixture
def registry(model_dir: Path) -> Iterator[Registry]:
    made = Registry(load_settings())
    made.add_model(clipserve.load(model_dir, device="cpu", dtype="fp32"))
    yield made
    made.close()


def client_of(
    registry: Registry, lifecycle: Lifecycle | None = None, **settings: Any
) -> TestClient:
    app = create_app(load_settings(**settings), registry, lifecycle)
    return TestClient(app, base_url="http://localhost")


def test_ready_follows_the_phase_and_live_does_not(registry: Registry):
    lifecycle = Lifecycle("loading")
    with client_of(registry, lifecycle) as client:
        for phase, status in (("loading", 503), ("serving", 200), ("draining", 503)):
            lifecycle.phase = phase
            assert client.get("/health/ready").status_code == status
            assert client.get("/health/live").status_code == 200
            assert client.get("/health").status_code == 200
            assert client.post("/v1/embeddings", json={"input": "x"}).status_code == status


def test_without_a_model_nothing_is_ready():
    registry = Registry(load_settings())
    with client_of(registry) as client:
        assert client.get("/health/ready").status_code == 503
        assert client.get("/health/live").status_code == 200
    registry.close()


def test_without_keys_health_names_the_models(registry: Registry):
    with client_of(registry) as client:
        (model,) = client.get("/health").json()["models"]
    assert model["name"] == "tiny"


def test_ready_asks_the_model_but_once_a_second(registry: Registry, monkeypatch):
    asked = []

    async def canary(served: Any) -> None:
        asked.append(served.name)
        if len(asked) > 1:
            raise ModelFailed("broken")

    now = 0.0
    monkeypatch.setattr(health, "_canary", canary)
    monkeypatch.setattr(health.time, "monotonic", lambda: now)
    with client_of(registry) as client:
        statuses = [client.get("/health/ready").status_code for _ in range(3)]
        now = 1.5
        statuses.append(client.get("/health/ready").status_code)
        assert client.get("/health/live").status_code == 200
    assert statuses == [200, 200, 200, 503]
    assert len(asked) == 2


@pytest.mark.parametrize("stage", ["decode", "tokenize"])
def test_a_hung_decoder_or_tokenizer_is_not_ready_until_it_is_replaced(
    model_dir: Path, monkeypatch, stage: str
):
    registry = Registry(load_settings(ready_timeout_s=0.5, decode_threads=1, max_batch_s=60))
    served = registry.add_model(clipserve.load(model_dir, device="cpu", dtype="fp32"))
    pool = registry.decoders if stage == "decode" else served.pipeline._tokenizer_thread
    go_on = threading.Event()
    hung = served.pipeline.batcher.admit(1)
    pool.submit(hung, [0], lambda: go_on.wait(60) and None)
    monkeypatch.setattr(health, "_FRESH_S", 0.0)
    with client_of(registry) as client:
        assert client.get("/health/ready").status_code == 503
        assert client.get("/health/live").status_code == 200
        monkeypatch.setattr(pool, "_clock", lambda: time.monotonic() + 60)
        pool.inspect()
        assert isinstance(hung.results[0], ModelFailed)
        monkeypatch.setattr(pool, "_clock", time.monotonic)
        registry.settings = load_settings(ready_timeout_s=30)
        assert client.get("/health/ready").status_code == 200
    go_on.set()
    registry.close()


@pytest.mark.parametrize("name", ["pool", "_store"])
def test_while_all_threads_for_bodies_or_searches_hang_nothing_is_ready(
    model_dir: Path, monkeypatch, name: str
):
    registry = Registry(load_settings(ready_timeout_s=30, search_threads=2))
    registry.add_model(clipserve.load(model_dir, device="cpu", dtype="fp32"))
    monkeypatch.setattr(health, "_FRESH_S", 0.0)
    go_on = threading.Event()
    with client_of(registry) as client:
        assert client.get("/health/ready").status_code == 200
        hung = [getattr(registry, name).submit(go_on.wait, 60) for _ in range(2)]
        registry.settings = load_settings(ready_timeout_s=0.5)
        refused = client.get("/health/ready")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        assert client.get("/health/live").status_code == 200
        go_on.set()
        assert all(one.result(30) for one in hung)
        registry.settings = load_settings(ready_timeout_s=30)
        assert client.get("/health/ready").status_code == 200
    registry.close()


def test_a_model_that_only_a_collection_is_searched_with_is_asked_too(
    registry: Registry, model_dir: Path, architecture: dict[str, object], tmp_path: Path
):
    old = registry.model("tiny")
    fill(tmp_path / "toys", old.model)
    registry.add_collection(tmp_path / "toys")
    checkpoint.save(create(architecture), tmp_path / "new", name="tiny")
    asyncio.run(registry.reload("tiny", tmp_path / "new"))
    with client_of(registry) as client:
        assert client.get("/health/ready").status_code == 200
    old.pipeline.close()
    with client_of(registry) as client:
        assert client.get("/health/ready").status_code == 503


def test_with_keys_only_probes_and_the_page_are_open(registry: Registry, tmp_path: Path):
    key = add_key(tmp_path / "keys", "someone", "read")
    with client_of(registry, api_keys_file=tmp_path / "keys") as client:
        for path in ("/", "/health", "/health/live", "/health/ready", "/openapi.json"):
            assert client.get(path).status_code == 200, path
        known = {"Authorization": f"Bearer {key}"}
        for path in ("/metrics", "/v1/models", "/v1/collections"):
            assert client.get(path).status_code == 401, path
            assert client.get(path, headers=known).status_code == 200, path
        assert sorted(client.get("/health").json()) == ["status", "unix"]
        refused = client.delete("/v1/collections/toys", headers=known)
        assert refused.json()["error"]["code"] == "insufficient_scope"


def test_no_other_origin_may_ask_unless_it_is_named(registry: Registry):
    question = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
    with client_of(registry) as client:
        answer = client.options("/v1/embeddings", headers=question)
        assert answer.status_code == 405
        assert "access-control-allow-origin" not in answer.headers


def test_a_named_origin_may_ask_though_its_question_has_no_key(registry: Registry, tmp_path: Path):
    add_key(tmp_path / "keys", "someone", "read")
    settings = {"api_keys_file": tmp_path / "keys", "cors_origins": "https://shop.example"}
    with client_of(registry, **settings) as client:
        question = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
        answer = client.options("/v1/embeddings", headers=question)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://shop.example"
        refused = client.post("/v1/embeddings", headers={"Origin": "https://shop.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://shop.example"
        other = {"Origin": "https://other.example", "Access-Control-Request-Method": "POST"}
        assert client.options("/v1/embeddings", headers=other).status_code == 400


def test_a_reply_says_how_long_the_queue_and_the_model_took(registry: Registry):
    with client_of(registry) as client:
        answer = client.post("/v1/embeddings", json={"input": ["never asked before"]})
    assert answer.status_code == 200
    for name in ("total", "queue", "inference"):
        assert float(answer.headers[f"x-{name}-time"]) >= 0
    assert float(answer.headers["x-inference-time"]) > 0


def test_probes_may_ask_for_the_head_alone(registry: Registry):
    lifecycle = Lifecycle("loading")
    with client_of(registry, lifecycle) as client:
        for phase, status in (("loading", 503), ("serving", 200)):
            lifecycle.phase = phase
            assert client.head("/health/ready").status_code == status
            assert client.head("/health/live").status_code == 200
            assert client.head("/health").status_code == 200
            assert client.head("/").status_code == 200
