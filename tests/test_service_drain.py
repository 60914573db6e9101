"""The phases of a service, and what is answered in each."""

import asyncio

from fastapi import FastAPI
from starlette.testclient import TestClient

from service.drain import Gate, Lifecycle


def client_of(lifecycle: Lifecycle) -> TestClient:
    app = FastAPI()

    @app.get("/v1/thing")
    async def thing() -> str:
        return "served"

    @app.get("/v1/last")
    async def last() -> str:
        lifecycle.phase = "draining"
        return "served"

    @app.get("/health/live")
    @app.get("/metrics")
    async def live() -> str:
        return "live"

    app.add_middleware(Gate, lifecycle=lifecycle)
    return TestClient(app)


def test_only_while_serving_is_work_taken():
    lifecycle = Lifecycle("loading")
    client = client_of(lifecycle)
    for phase in ("loading", "draining"):
        lifecycle.phase = phase
        response = client.get("/v1/thing")
        assert (response.status_code, response.json()["error"]["code"]) == (503, phase)
        assert response.headers["connection"] == "close"
        assert response.headers["retry-after"] == "1"
        assert client.get("/health/live").status_code == 200
        assert client.get("/metrics").status_code == 200
    lifecycle.phase = "serving"
    response = client.get("/v1/thing")
    assert response.status_code == 200
    assert "connection" not in response.headers


def test_an_answer_that_ends_while_draining_closes_its_connection():
    assert client_of(Lifecycle()).get("/v1/last").headers["connection"] == "close"


def test_draining_waits_for_what_is_served():
    async def scenario() -> list[str]:
        lifecycle = Lifecycle()
        told = []
        lifecycle.enter()
        lifecycle.enter()
        draining = asyncio.ensure_future(lifecycle.drain(60))
        await asyncio.sleep(0)
        told.append(lifecycle.phase)
        lifecycle.leave()
        await asyncio.sleep(0)
        told.append("waits" if not draining.done() else "over")
        lifecycle.leave()
        await draining
        return told

    assert asyncio.run(scenario()) == ["draining", "waits"]


def test_draining_does_not_wait_for_ever():
    lifecycle = Lifecycle()
    lifecycle.enter()
    asyncio.run(lifecycle.drain(0.01))
    assert lifecycle.phase == "draining"


def test_with_nothing_to_serve_draining_is_over_at_once():
    asyncio.run(asyncio.wait_for(Lifecycle().drain(60), 5))
