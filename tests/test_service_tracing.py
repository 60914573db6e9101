"""Spans, with a provider that keeps them; the SDK itself is not needed."""

import contextlib
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from service import tracing
from service.logs import ObserveRequests
from service.settings import wants_tracing
from service.telemetry import Telemetry


class Span:
    def __init__(self, name: str, **given: Any) -> None:
        self.name, self.given, self.attributes, self.ended = name, given, {}, 0

    def update_name(self, name: str) -> None:
        self.name = name

    def set_attribute(self, name: str, value: object) -> None:
        self.attributes[name] = value

    def end(self, end_time: int) -> None:
        self.ended = end_time


class Provider:
    """A tracer provider and its tracer."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def get_tracer(self, name: str) -> "Provider":
        return self

    def start_span(self, name: str, **given: Any) -> Span:
        self.spans.append(Span(name, **given))
        return self.spans[-1]

    @contextlib.contextmanager
    def start_as_current_span(self, name: str, **given: Any) -> Any:
        yield self.start_span(name, **given)


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Provider:
    modules = {
        "opentelemetry.propagate": SimpleNamespace(extract=lambda sent: sent["traceparent"]),
        "opentelemetry.trace": SimpleNamespace(SpanKind=SimpleNamespace(SERVER="server")),
    }
    monkeypatch.setattr(tracing.importlib, "import_module", modules.__getitem__)
    return Provider()


def test_a_request_is_a_span_below_the_callers(provider: Provider):
    app = FastAPI()

    @app.get("/v1/items/{id}")
    async def item(id: str) -> str:
        return id

    telemetry = Telemetry()
    telemetry.tracing = tracing.Tracing(provider)
    app.add_middleware(ObserveRequests, telemetry=telemetry)
    sent = {"traceparent": "00-1-2-01", "X-Request-Id": "id-1"}
    assert TestClient(app).get("/v1/items/5", headers=sent).status_code == 200
    (span,) = provider.spans
    assert (span.name, span.given) == (
        "GET /v1/items/{id}",
        {"context": "00-1-2-01", "kind": "server"},
    )
    assert span.attributes == {
        "http.route": "/v1/items/{id}",
        "http.response.status_code": 200,
        "clipserve.request_id": "id-1",
    }


def test_a_batch_is_a_span_of_its_own(provider: Provider):
    telemetry = Telemetry()
    telemetry.tracing = tracing.Tracing(provider)
    telemetry.observe_model("tiny").batch("image", 4, 0.5, 0.1)
    (span,) = provider.spans
    assert span.given["attributes"]["clipserve.size"] == 4
    assert span.ended - span.given["start_time"] == 500_000_000


def test_without_the_packages_nothing_is_traced(monkeypatch: pytest.MonkeyPatch, caplog):
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(tracing.importlib, "import_module", missing)
    with caplog.at_level(logging.WARNING):
        assert tracing.start_tracing() is None
    assert "opentelemetry-sdk" in caplog.text


def test_tracing_is_wanted_where_its_variables_are_set(monkeypatch: pytest.MonkeyPatch):
    assert not wants_tracing()
    monkeypatch.setenv("OTEL_SERVICE_NAME", "pictures")
    assert wants_tracing()
