"""Whatever /openapi.json allows, and much that it does not, is answered without a 5xx."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browsing import listening
from conftest import encode, make_picture
from test_service_poison import Service

import clipserve
from service.app import create_app
from service.registry import Registry
from service.settings import load_settings

schemathesis = pytest.importorskip(
    "schemathesis", reason="needs schemathesis: pip install schemathesis"
)
hypothesis = pytest.importorskip("hypothesis")

pytestmark = pytest.mark.slow
_FEW = hypothesis.settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@schemathesis.serializer("application/x-ndjson")
def as_lines(ctx: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Service]:
    """Everything is allowed: collections and jobs are made, models loaded again."""
    folder = tmp_path_factory.mktemp("roots")
    for name in ("collections", "jobs", "models"):
        (folder / name).mkdir()
    settings = load_settings(
        decode_threads=2,
        text_cache_bytes=0,
        image_cache_bytes=0,
        collections_root=folder / "collections",
        jobs_dir=folder / "jobs",
        model_roots=[folder / "models"],
    )
    registry = Registry(settings)
    registry.add_model(clipserve.load(model_dir, device="cpu", dtype="fp32"), model_dir)
    with (
        listening(create_app(settings, registry)) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        yield Service(client, registry)
    registry.close()


def prepare(client: httpx.Client, label: str) -> dict[str, str]:
    """What the names in an operation's path stand for, made anew if an operation took it away."""
    if "/models/" in label:
        return {"name": "tiny"}
    client.put("/v1/collections/toys", json={})
    image = base64.b64encode(encode(make_picture())).decode()
    item = {"id": "1", "caption": "a toy", "image": image, "metadata": {"n": 1}}
    answer = client.put("/v1/collections/toys/items", json={"items": [item]})
    assert answer.status_code == 200, answer.text
    if "/jobs/" not in label:
        return {"name": "toys", "id": "1"}
    for job in client.get("/v1/jobs").json()["data"]:  # only so many may wait
        client.delete(f"/v1/jobs/{job['id']}")
    again = {"collection": "toys", "items": [item], "start": False}
    answer = client.post("/v1/jobs", json=again)
    assert answer.status_code == 202, answer.text
    return {"id": answer.json()["id"]}


def hammer(client: httpx.Client, operation: Any, mode: Any) -> str | None:
    """Send what one operation may get, or may not; how it failed, if it did."""
    statuses: set[int] = set()
    names: dict[str, str] = {}

    @hypothesis.seed(0)
    @_FEW
    @hypothesis.given(operation.as_strategy(generation_mode=mode), hypothesis.strategies.booleans())
    def send(case: Any, is_known: bool) -> None:
        if is_known:
            case.path_parameters.update({k: names[k] for k in case.path_parameters})
            if isinstance(case.body, dict) and {"collection", "indice_name"} & set(case.body):
                case.body.update(
                    {k: "toys" for k in ("collection", "indice_name") if k in case.body}
                )
        response = case.call()
        statuses.add(response.status_code)
        assert response.status_code < 500, response.text[:300]
        if (
            response.status_code < 400
            and case.path_parameters
            and is_known
            and case.method != "GET"
        ):
            names.update(prepare(client, operation.label))

    names.update(prepare(client, operation.label))
    try:
        send()
    except hypothesis.errors.Unsatisfiable as error:
        # Where no JSON and no query is taken, any text in the path and any bytes are right.
        takes_json = any(body.media_type == "application/json" for body in operation.body)
        if takes_json or operation.query:
            return f"{operation.label}: {error}"
    except Exception as error:
        return f"{operation.label}: {type(error).__name__}: {error}"
    else:
        if statuses <= {403, 404, 405}:
            return f"{operation.label}: was never reached, only {sorted(statuses)}"
    return None


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_no_request_is_answered_with_a_5xx(service: Service, mode: str):
    client = service.client
    schema = schemathesis.openapi.from_url(f"{client.base_url}openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 20
    problems = [hammer(client, one, schemathesis.GenerationMode[mode]) for one in operations]
    assert not any(problems), "\n".join(filter(None, problems))
    service.check()
