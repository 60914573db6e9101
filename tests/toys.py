"""A small service for the tests of what others ask it: a tiny model and a collection `toys`."""

import base64
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from conftest import encode, make_picture
from starlette.testclient import TestClient

import clipserve
from clipserve.images import make_thumbnail
from clipserve.model import Model
from index.collection import Collection, Item
from service.app import create_app
from service.registry import Registry
from service.server import listen
from service.settings import load_settings

COUNT = 6


@dataclass
class Toys:
    """The service, and what the answers should be."""

    model: Model
    registry: Registry
    client: TestClient
    pictures: list[bytes]
    vectors: np.ndarray
    """(COUNT, E), of the pictures"""

    def post(self, path: str, **body: Any) -> Any:
        return self.client.post(path, json=body)

    def texts(self, *texts: str) -> np.ndarray:
        """(N, E)"""
        return self.model.embed_texts(texts)

    def error(self, response: Any) -> dict[str, Any]:
        """The fields of an error body, which is always the same."""
        body = response.json()
        assert list(body) == ["error"]
        assert sorted(body["error"]) == ["code", "message", "param", "type"]
        found: dict[str, Any] = body["error"]
        return found


@contextlib.contextmanager
def toys(folder: Path, model_dir: Path, **settings: Any) -> Iterator[Toys]:
    """The service over ASGI, with a collection of COUNT pictures; items 0 and 1 are alike."""
    with _filled(folder, model_dir, settings) as (registry, pictures, vectors):
        app = create_app(registry.settings, registry)
        with TestClient(app, base_url="http://localhost") as client:
            model = registry.models["tiny"].model
            yield Toys(model, registry, client, pictures, vectors)


@contextlib.contextmanager
def listening(
    folder: Path, model_dir: Path, **settings: Any
) -> Iterator[tuple[str, Model, list[bytes]]]:
    """The same for real clients: the address at which it listens, its model and its pictures."""
    with (
        _filled(folder, model_dir, settings) as (registry, pictures, _),
        listen("127.0.0.1", 0) as listener,
    ):
        app = create_app(registry.settings, registry)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            address = f"http://127.0.0.1:{listener.getsockname()[1]}"
            yield address, registry.models["tiny"].model, pictures
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def _filled(
    folder: Path, model_dir: Path, settings: dict[str, Any]
) -> Iterator[tuple[Registry, list[bytes], np.ndarray]]:
    model = clipserve.load(model_dir, device="cpu", dtype="fp32")
    drawn = [make_picture(seed=max(i, 1)) for i in range(COUNT)]
    pictures = [encode(picture) for picture in drawn]
    vectors = model.embed_images(pictures)
    with Collection.create(
        folder / "toys",
        fingerprint=model.info.fingerprint,
        model_name="tiny",
        embed_dim=model.embed_dim,
    ) as collection:
        items = [Item(f"toy/{i}", f"toy {i}", "here", {"n": i}) for i in range(COUNT)]
        collection.upsert(items, vectors, [make_thumbnail(picture) for picture in drawn])
    registry = Registry(load_settings(decode_threads=2, **settings))
    try:
        registry.add_model(model, model_dir)
        registry.add_collection(folder / "toys")
        yield registry, pictures, vectors
    finally:
        registry.close()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{b64(data)}"


def from_b64(texts: list[str]) -> np.ndarray:
    """(N, E) from base64 of little-endian float32."""
    return np.stack([np.frombuffer(base64.b64decode(text), "<f4") for text in texts])
