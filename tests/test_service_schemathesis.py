"""Whatever /openapi.json allows, and much that it does not, is answered without a 5xx."""

from typing import Any

import pytest
from test_service_poison import Service
from test_service_poison import service as service

schemathesis = pytest.importorskip(
    "schemathesis", reason="needs schemathesis: pip install schemathesis"
)
hypothesis = pytest.importorskip("hypothesis")

pytestmark = [
    pytest.mark.slow,
    # Of the ASGI client that schemathesis uses.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::starlette.exceptions.StarletteDeprecationWarning"),
]
_FEW = hypothesis.settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@schemathesis.serializer("application/x-ndjson")
def as_lines(ctx: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


def hammer(operation: Any, mode: Any) -> str | None:
    """Send what one operation may get, or may not; how it failed, if it did."""

    @hypothesis.seed(0)
    @_FEW
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        response = case.call()
        assert response.status_code < 500, response.text[:300]

    try:
        send()
    except hypothesis.errors.Unsatisfiable as error:
        # Where no JSON and no query is taken, any text in the path and any bytes are right.
        takes_json = any(body.media_type == "application/json" for body in operation.body)
        if takes_json or operation.query:
            return f"{operation.label}: {error}"
    except Exception as error:
        return f"{operation.label}: {type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_no_request_is_answered_with_a_5xx(service: Service, mode: str):
    schema = schemathesis.openapi.from_asgi("/openapi.json", service.client.app)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 20
    problems = [hammer(one, schemathesis.GenerationMode[mode]) for one in operations]
    assert [problem for problem in problems if problem] == []
    service.check()
