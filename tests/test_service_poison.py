"""Every hostile request gets its answer, and the good one right after it is answered correctly."""

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import encode, make_picture
from poison import Hostile, hostile_requests, problem
from starlette.testclient import TestClient

import clipserve
from clipserve.images import make_thumbnail
from index.collection import Collection, Item
from service.app import create_app
from service.registry import Registry
from service.settings import load_settings

LABELS = ["cat", "dog"]


class Service:
    """A real tiny model behind the whole app, and the good requests with their answers."""

    def __init__(self, client: Any, registry: Registry) -> None:
        self.client = client
        self.registry = registry
        self.model = registry.models["tiny"].model
        self.picture = encode(make_picture())
        self.text_vector = self.model.embed_texts(["a cat"])[0]
        self.picture_vector = self.model.embed_images([self.picture])[0]

    def check(self) -> None:
        """A text and a picture are embedded as the model does, and nothing is left in its queue."""
        image = base64.b64encode(self.picture).decode()
        body = {"input": ["a cat", {"image": image}]}
        data = self.client.post("/v1/embeddings", json=body).json()["data"]
        np.testing.assert_allclose(data[0]["embedding"], self.text_vector, atol=1e-5)
        np.testing.assert_allclose(data[1]["embedding"], self.picture_vector, atol=1e-5)
        assert self.registry.models["tiny"].pipeline.batcher.open_items == 0


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("poison")
    model = clipserve.load(model_dir, device="cpu", dtype="fp32")
    picture = make_picture()
    with Collection.create(
        folder / "toys",
        fingerprint=model.info.fingerprint,
        model_name="tiny",
        embed_dim=model.embed_dim,
    ) as collection:
        vectors = model.embed_images([picture])
        collection.upsert([Item("1", "a toy", "", {"n": 1})], vectors, [make_thumbnail(picture)])
    settings = load_settings(decode_threads=2, text_cache_bytes=0, image_cache_bytes=0)
    registry = Registry(settings)
    registry.add_model(model)
    registry.add_collection(folder / "toys")
    with TestClient(create_app(settings, registry), base_url="http://localhost") as client:
        yield Service(client, registry)
    registry.close()


@pytest.mark.parametrize("row", hostile_requests(), ids=lambda row: row.name)
def test_a_hostile_request_harms_nobody(service: Service, row: Hostile):
    answer = service.client.request(
        row.method, row.path, content=row.body, headers=row.headers, follow_redirects=False
    )
    assert problem(row, answer.status_code, answer.content) is None
    service.check()


def test_texts_too_long_for_the_model_are_cut_and_say_so(service: Service):
    body = {"input": ["word " * 1_900] * 20}
    data = service.client.post("/v1/embeddings", json=body).json()["data"]
    assert all(item["truncated"] for item in data)


def test_one_bad_picture_among_many_is_that_ones_error(service: Service):
    good, bad = (base64.b64encode(data).decode() for data in (service.picture, b"\xff\xd8\xff"))
    body = {"input": [{"image": good}] * 31 + [{"image": bad}], "on_error": "report"}
    answer = service.client.post("/v1/embeddings", json=body).json()
    assert len(answer["data"]) == 31
    assert [error["index"] for error in answer["errors"]] == [31]


def send_raw(service: Service, messages: list[dict]) -> list[dict]:
    """One request to the app, message by message, as a server would bring it."""
    sent: list[dict] = []

    async def receive() -> dict:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    async def run() -> None:
        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/embeddings",
            "raw_path": b"/v1/embeddings",
            "query_string": b"",
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "scheme": "http",
            "http_version": "1.1",
        }
        await service.client.app(scope, receive, send)

    asyncio.run(run())
    return sent


def test_a_client_that_leaves_is_not_worked_for(service: Service):
    body = json.dumps({"input": ["a dog"] * 200}).encode()
    sent = send_raw(service, [{"type": "http.request", "body": body, "more_body": False}])
    assert sent == []
    service.check()


def test_a_client_that_leaves_within_its_body_is_forgotten(service: Service):
    assert send_raw(service, [{"type": "http.request", "body": b"{", "more_body": True}]) == []
    service.check()
