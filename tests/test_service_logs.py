"""The outermost middleware and the formatter: ids, a line a request, headers, what is not said."""

import json
import logging
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.testclient import TestClient

from service.errors import Overloaded, install_handlers
from service.logs import JsonFormatter, ObserveRequests, use_format
from service.notes import notes
from service.telemetry import Telemetry


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


@pytest.fixture
def client(telemetry: Telemetry) -> TestClient:
    app = FastAPI()

    @app.get("/v1/items/{id}")
    async def item(id: str) -> str:
        notes().items += 3
        notes().key = "someone"
        notes().ran(0.5, 0.25)
        notes().ran(0.125, 0.25)
        return notes().id

    @app.get("/v1/broken")
    async def broken(request: Request) -> None:
        raise RuntimeError("secret detail")

    @app.get("/v1/busy")
    async def busy() -> None:
        raise Overloaded("later")

    @app.get("/health/live")
    async def live() -> None: ...

    install_handlers(app)
    app.add_middleware(ObserveRequests, telemetry=telemetry)
    return TestClient(app)


def lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "service.logs"]


class Growing(dict[str, float]):
    """As if a model's thread added to it whenever it is walked."""

    def items(self) -> Any:
        for pair in super().items():
            self["inference"] = 0.25
            yield pair


def test_a_line_is_written_while_a_model_still_notes_its_time(telemetry: Telemetry, caplog):
    app = FastAPI()

    @app.get("/")
    async def late() -> None:
        notes().seconds = Growing(queue=0.5)

    app.add_middleware(ObserveRequests, telemetry=telemetry)
    with caplog.at_level(logging.INFO, "service"):
        TestClient(app).get("/")
    (line,) = lines(caplog)
    assert line.__dict__["fields"]["queue_ms"] == 500.0


def test_an_id_that_a_client_sends_is_kept(client: TestClient):
    response = client.get("/v1/items/1", headers={"X-Request-Id": "abc-1.2:3_4"})
    assert response.headers["x-request-id"] == response.json() == "abc-1.2:3_4"


@pytest.mark.parametrize("sent", ["", "a b", "a" * 65, 'a"b', "<script>", "a;b"])
def test_any_other_is_replaced(client: TestClient, sent: str):
    made = client.get("/v1/items/1", headers={"X-Request-Id": sent}).headers["x-request-id"]
    assert len(made) == 32
    assert client.get("/v1/items/1").headers["x-request-id"] != made


def test_every_reply_says_how_long_it_took_and_is_not_sniffed(client: TestClient):
    for path in ("/v1/items/1", "/nowhere", "/v1/broken", "/health/live"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert float(headers["x-total-time"]) >= 0
        assert headers["server-timing"].startswith("total;dur=")
    headers = client.get("/v1/items/1").headers
    assert headers["x-queue-time"] == "500.0"
    assert headers["x-inference-time"] == "500.0"
    assert headers["server-timing"].endswith(", queue;dur=500.0, inference;dur=500.0")


def test_a_request_is_one_line_without_what_it_held(client: TestClient, caplog):
    with caplog.at_level(logging.INFO, "service"):
        client.get(
            "/v1/items/s3cret?q=s3cret", headers={"X-Request-Id": "id-1", "Cookie": "s3cret"}
        )
    (record,) = lines(caplog)
    assert "s3cret" not in record.getMessage()
    assert record.getMessage().startswith("GET /v1/items/{id} 200: request_id id-1, ms ")
    fields = json.loads(JsonFormatter().format(record))
    assert {name: fields[name] for name in ("request_id", "route", "status", "items", "key")} == {
        "request_id": "id-1",
        "route": "/v1/items/{id}",
        "status": 200,
        "items": 3,
        "key": "someone",
    }
    assert fields["queue_ms"] == 500.0
    assert fields["ms"] >= 0
    assert "error" not in fields


def test_probes_are_not_told_of(client: TestClient, caplog):
    with caplog.at_level(logging.INFO, "service"):
        client.get("/health/live")
    assert lines(caplog) == []


def test_what_nobody_answers_is_answered_once_with_an_id(client: TestClient, caplog):
    response = client.get("/v1/broken", headers={"X-Request-Id": "id-2"})
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "id-2"
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    (problem,) = [record for record in caplog.records if record.exc_info]
    written = json.loads(JsonFormatter().format(problem))
    assert "secret detail" in written["exception"]


def test_rejections_are_counted_by_their_code(client: TestClient, telemetry: Telemetry):
    assert client.get("/v1/busy").headers["x-clipserve-error"] == "overloaded"
    client.get("/v1/busy")
    client.get("/nowhere")
    shown = telemetry.render().decode()
    assert 'clipserve_rejected_total{reason="overloaded"} 2.0' in shown
    assert 'clipserve_rejected_total{reason="not_found"} 1.0' in shown
    assert 'clipserve_requests_total{method="GET",route="/v1/busy",status="429"} 2.0' in shown


def test_a_record_outside_of_requests_has_no_id():
    record = logging.LogRecord("name", logging.INFO, "", 0, "%d things\n", (3,), None)
    fields = json.loads(JsonFormatter().format(record))
    assert fields["message"] == "3 things\n"
    assert "request_id" not in fields


def test_the_format_is_as_set():
    root = logging.getLogger()
    handler = logging.StreamHandler()
    root.addHandler(handler)
    kept = {one: one.formatter for one in root.handlers}
    try:
        use_format("text")
        assert handler.formatter is None
        use_format("json")
        assert isinstance(handler.formatter, JsonFormatter)
    finally:
        for one, formatter in kept.items():
            one.setFormatter(formatter)
        root.removeHandler(handler)
