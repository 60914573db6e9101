"""A service for the tests: a real tiny model, a real small collection, real pictures, over ASGI."""

import base64
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from conftest import encode, make_picture
from fastapi import FastAPI
from starlette.testclient import TestClient

import clipserve
from clipserve.images import make_thumbnail
from clipserve.model import Model
from index.collection import Collection, Item
from service.app import create_app
from service.registry import Registry
from service.settings import Settings

COUNT = 12
LABELS = ["cat", "dog", "red heart"]


@dataclass
class World:
    """A service and what it serves."""

    model: Model
    registry: Registry
    app: FastAPI
    client: TestClient
    pictures: list[bytes]
    """COUNT PNGs, those of the collection's items"""
    vectors: np.ndarray
    """(COUNT, E), theirs"""
    folder: Path
    """where the collection `toys` is"""

    def post(self, path: str, /, **body: Any) -> Any:
        return self.client.post(path, json=body)

    def put(self, path: str, /, **body: Any) -> Any:
        return self.client.put(path, json=body)

    def get(self, path: str, /, **query: Any) -> Any:
        return self.client.get(path, params=query)


def build(folder: Path, model_dir: Path, settings: Settings) -> tuple[Registry, FastAPI]:
    """A service over a model and a collection `toys` of COUNT pictures."""
    model = clipserve.load(model_dir, device="cpu", dtype="fp32")
    if not (folder / "toys").exists():
        fill(folder / "toys", model)
    registry = Registry(settings)
    registry.add_model(model, model_dir)
    registry.add_collection(folder / "toys")
    return registry, create_app(settings, registry)


def fill(path: Path, model: Model) -> None:
    """A collection of the pictures with the seeds 0 to COUNT - 1; `n` counts them."""
    pictures = [make_picture(seed=i) for i in range(COUNT)]
    with Collection.create(
        path,
        fingerprint=model.info.fingerprint or "",
        model_name=model.info.name,
        embed_dim=model.embed_dim,
    ) as collection:
        items = [
            Item(f"toys/{i}", f"picture {i}", "here", {"n": i, "even": i % 2 == 0})
            for i in range(COUNT)
        ]
        thumbnails = [make_thumbnail(picture) for picture in pictures]
        collection.upsert(items, model.embed_images(pictures), thumbnails)


@contextlib.contextmanager
def serving(folder: Path, model_dir: Path, settings: Settings) -> Iterator[World]:
    """The service of `build`, open to requests."""
    registry, app = build(folder, model_dir, settings)
    model = next(iter(registry.models.values())).model
    pictures = [encode(make_picture(seed=i)) for i in range(COUNT)]
    try:
        with TestClient(app, base_url="http://localhost") as client:
            vectors = model.embed_images(pictures)
            yield World(model, registry, app, client, pictures, vectors, folder)
    finally:
        registry.close()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{b64(data)}"


def error(response: Any) -> dict[str, Any]:
    """The four fields of an error, which is all that its body holds."""
    body = response.json()
    assert list(body) == ["error"]
    assert sorted(body["error"]) == ["code", "message", "param", "type"]
    fields: dict[str, Any] = body["error"]
    return fields


def check_refusal(response: Any, status: int, word: str) -> None:
    """A refusal with that status, and that word in its message."""
    assert response.status_code == status, response.text
    assert word in error(response)["message"]


def post_json(world: World, path: str, body: Any) -> Any:
    """As JSON that may hold NaN, which `World.post` refuses."""
    headers = {"Content-Type": "application/json"}
    return world.client.post(path, content=json.dumps(body), headers=headers)


def check_hits(world: World, hits: list[dict[str, Any]], query: np.ndarray, k: int) -> None:
    """The k nearest of the collection, as numpy finds them."""
    scores = world.vectors @ query
    best = np.argsort(-scores, kind="stable")[:k]
    assert [hit["id"] for hit in hits] == [f"toys/{i}" for i in best]
    np.testing.assert_allclose([hit["score"] for hit in hits], scores[best], atol=1e-5)
