"""The routes, over ASGI in process: a real tiny model, a real small collection, real pictures."""

import base64
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import encode, make_picture
from fastapi import FastAPI
from starlette.testclient import TestClient

import clipserve
from clipserve.images import make_thumbnail
from clipserve.model import Model
from index.collection import Collection, Item
from service.app import create_app, serve
from service.registry import Registry
from service.settings import Settings, load_settings

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
    vectors: np.ndarray

    def post(self, path: str, **body: Any) -> Any:
        return self.client.post(path, json=body)


def build(folder: Path, model_dir: Path, settings: Settings) -> tuple[Registry, FastAPI]:
    """A service over the tiny model and a collection `toys` of COUNT pictures."""
    model = clipserve.load(model_dir, device="cpu", dtype="fp32")
    pictures = [make_picture(seed=i) for i in range(COUNT)]
    with Collection.create(
        folder / "toys",
        fingerprint=model.info.fingerprint,
        model_name="tiny",
        embed_dim=model.embed_dim,
    ) as collection:
        items = [Item(f"toys/{i}", f"picture {i}", "here", {"n": i}) for i in range(COUNT)]
        thumbnails = [make_thumbnail(picture) for picture in pictures]
        collection.upsert(items, model.embed_images(pictures), thumbnails)
    registry = Registry(settings)
    registry.add_model(model)
    registry.add_collection(folder / "toys")
    return registry, create_app(settings, registry)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("service")
    settings = load_settings(decode_threads=2, max_body_bytes=4 * 2**20)
    registry, app = build(folder, model_dir, settings)
    model = registry.models["tiny"].model
    pictures = [encode(make_picture(seed=i)) for i in range(COUNT)]
    with TestClient(app) as client:
        yield World(model, registry, app, client, pictures, model.embed_images(pictures))
    registry.close()


@pytest.fixture
def own_world(tmp_path: Path, model_dir: Path) -> Iterator[World]:
    """One that a test may change."""
    registry, app = build(tmp_path, model_dir, load_settings())
    model = registry.models["tiny"].model
    with TestClient(app) as client:
        yield World(model, registry, app, client, [], np.zeros(0))
    registry.close()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{b64(data)}"


def error(response: Any) -> dict[str, Any]:
    body = response.json()
    assert list(body) == ["error"]
    assert sorted(body["error"]) == ["code", "message", "param", "type"]
    return body["error"]


# Embeddings


def test_texts_get_the_vectors_the_model_gives(world: World):
    texts = ["a cat", "a dog " * 50, "x"]
    body = world.post("/v1/embeddings", model="tiny", input=texts).json()
    assert [item["index"] for item in body["data"]] == [0, 1, 2]
    got = np.array([item["embedding"] for item in body["data"]])
    np.testing.assert_allclose(got, world.model.embed_texts(texts), atol=1e-5)
    assert [item["truncated"] for item in body["data"]] == [False, True, False]
    assert body["usage"] == {"prompt_tokens": 4 + 16 + 3, "total_tokens": 4 + 16 + 3}
    assert body["object"] == "list"


def test_pictures_and_texts_mix_in_one_request(world: World):
    given = ["a cat", {"image": b64(world.pictures[0])}, {"text": "dog"}]
    body = world.post("/v1/embeddings", input=given).json()
    got = np.array([item["embedding"] for item in body["data"]])
    want = np.stack([*world.model.embed_texts(["a cat", "dog"]), world.vectors[0]])[[0, 2, 1]]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_base64_vectors_are_little_endian_floats(world: World):
    uris = [data_uri(picture) for picture in world.pictures[:3]]
    answer = world.post("/v1/embeddings", input=uris, modality="image", encoding_format="base64")
    got = [np.frombuffer(base64.b64decode(d["embedding"]), "<f4") for d in answer.json()["data"]]
    np.testing.assert_allclose(np.stack(got), world.vectors[:3], atol=1e-5)


def test_a_single_string_is_an_input(world: World):
    body = world.post("/v1/embeddings", input="a cat", dimensions=16, user="me").json()
    assert len(body["data"]) == 1


def test_one_bad_picture_fails_the_request_or_is_reported_beside_the_others(world: World):
    given = [{"image": b64(world.pictures[0])}, {"image": b64(b"no picture")}, "a cat"]
    failed = world.post("/v1/embeddings", input=given)
    assert failed.status_code == 422
    assert error(failed)["param"] == "input[1]"
    body = world.post("/v1/embeddings", input=given, on_error="report").json()
    assert [item["index"] for item in body["data"]] == [0, 2]
    (problem,) = body["errors"]
    assert (problem["index"], problem["error"]["code"]) == (1, "invalid_image")


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({"input": [1, 2, 3]}, 400, "check_embedding_ctx_length"),
        ({"input": [[1, 2], [3]]}, 400, "check_embedding_ctx_length"),
        ({"input": []}, 400, "empty"),
        ({"input": ""}, 400, "empty"),
        ({"input": ["x"] * 2049}, 400, "at most 256"),
        ({"input": "x", "dimensions": 8}, 400, "16"),
        ({"input": "x", "model": "gpt-4"}, 404, "served here: tiny"),
        ({"input": "x", "modality": "audio"}, 422, "modality"),
        ({"input": "https://example.org/a.png", "modality": "image"}, 400, "URL"),
        ({"input": [{"image": "file:///etc/passwd"}]}, 400, "URL"),
        ({"input": [{"image": "/etc/passwd"}]}, 400, "base64"),
        ({"input": [{"image": "data:image/png,x"}]}, 400, "data URI"),
        ({"input": [{"image": "x", "text": "y"}]}, 400, '{"text": ...}'),
        ({"input": "data:image/png;base64,AAAA"}, 400, "modality"),
        ({}, 422, "input"),
    ],
)
def test_a_wrong_embedding_request_says_what_is_wrong(world: World, body, status, word):
    response = world.client.post("/v1/embeddings", json=body)
    assert response.status_code == status
    assert word in error(response)["message"]


# Classification


@pytest.mark.parametrize("templates", ["none", "simple", ["a {}", "the {c}"]])
def test_probabilities_are_those_of_the_models_own_head(world: World, templates):
    images = [b64(picture) for picture in world.pictures[:4]]
    body = world.post("/v1/classify", images=images, labels=LABELS, templates=templates).json()
    want = world.model.zero_shot(LABELS, templates).classify(world.pictures[:4])
    for result, row in zip(body["results"], want, strict=True):
        found = result["predictions"]
        assert [p["label"] for p in found] == [LABELS[c] for c in np.argsort(-row)]
        np.testing.assert_allclose([p["probability"] for p in found], -np.sort(-row), atol=1e-5)
    assert body["activation"] == "softmax"


def test_a_form_classifies_files(world: World):
    files = [("files", ("a.png", picture)) for picture in world.pictures[:2]]
    form = {"labels": "cat, dog,red heart", "templates": "simple", "top_k": "2"}
    results = world.client.post("/v1/classify", files=files, data=form).json()["results"]
    want = world.model.zero_shot(LABELS, "simple").classify(world.pictures[:2])
    assert [len(result["predictions"]) for result in results] == [2, 2]
    top = [result["predictions"][0]["probability"] for result in results]
    np.testing.assert_allclose(top, want.max(axis=1), atol=1e-5)
    repeated = {"labels": ["cat, small", "dog"]}
    results = world.client.post("/v1/classify", files=files[:1], data=repeated).json()["results"]
    assert {p["label"] for p in results[0]["predictions"]} == {"cat, small", "dog"}


def test_a_broken_picture_has_an_error_and_the_others_have_answers(world: World):
    images = [b64(world.pictures[0]), b64(world.pictures[1][:60]), "%%%", b64(world.pictures[2])]
    response = world.post("/v1/classify", images=images, labels=LABELS)
    assert response.status_code == 200
    results = response.json()["results"]
    assert ["predictions" in result for result in results] == [True, False, False, True]
    assert [result["index"] for result in results] == [0, 1, 2, 3]
    assert results[1]["error"]["code"] == "invalid_image"
    assert results[2]["error"]["code"] == "invalid_base64"
    assert results[2]["error"]["param"] == "images[2]"


def test_templates_are_never_read_from_a_file(world: World, tmp_path: Path):
    file = tmp_path / "templates.txt"
    file.write_text("a secret {}\n")
    for templates in (str(file), "../../etc/passwd", [str(file)]):
        response = world.post(
            "/v1/classify", images=[b64(world.pictures[0])], labels=["a"], templates=templates
        )
        assert response.status_code == 400
        assert "secret" not in response.text
        assert str(file) not in response.text


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"labels": []}, 400, "labels is empty"),
        ({"labels": ["a", " "]}, 400, "labels[1] is empty"),
        ({"labels": ["a"] * 2001}, 400, "2000"),
        ({"labels": ["a"] * 200, "templates": "openai"}, 400, "16000 texts; at most 8192"),
        ({"templates": []}, 400, "templates is empty"),
        ({"images": []}, 400, "images is empty"),
        ({"images": ["http://127.0.0.1/a.png"]}, 400, "URL"),
        ({"top_k": 0}, 422, "top_k"),
        ({"lables": ["a"]}, 422, "does not know"),
    ],
)
def test_a_wrong_classification_says_what_is_wrong(world: World, change, status, word):
    body = {"images": [b64(world.pictures[0])], "labels": ["a"]} | change
    response = world.client.post("/v1/classify", json=body)
    assert response.status_code == status
    assert word in error(response)["message"]


# Search


def check_hits(world: World, response: Any, query: np.ndarray, k: int) -> None:
    hits = response.json()["hits"]
    scores = world.vectors @ query
    best = np.argsort(-scores, kind="stable")[:k]
    assert [hit["id"] for hit in hits] == [f"toys/{i}" for i in best]
    np.testing.assert_allclose([hit["score"] for hit in hits], scores[best], atol=1e-5)


def test_a_text_a_picture_or_a_vector_finds_the_nearest(world: World):
    text = world.post("/v1/search", text="a red heart", k=5)
    check_hits(world, text, world.model.embed_texts(["a red heart"])[0], 5)
    image = world.post("/v1/search", collection="toys", image=b64(world.pictures[3]), k=3)
    check_hits(world, image, world.vectors[3], 3)
    vector = world.post("/v1/search", vector=(7 * world.vectors[5]).tolist(), k=2)
    check_hits(world, vector, world.vectors[5], 2)
    hit = vector.json()["hits"][0]
    assert (hit["caption"], hit["metadata"]) == ("picture 5", {"n": 5})
    form = world.client.post("/v1/search", files={"file": world.pictures[4]}, data={"k": "4"})
    check_hits(world, form, world.vectors[4], 4)


def test_a_hit_leads_to_its_picture_which_may_be_cached(world: World):
    hit = world.post("/v1/search", image=b64(world.pictures[3]), k=1).json()["hits"][0]
    picture = world.client.get(hit["image_url"])
    assert picture.headers["content-type"] == "image/jpeg"
    assert picture.content == make_thumbnail(make_picture(seed=3))
    assert "immutable" in picture.headers["cache-control"]
    again = {"If-None-Match": picture.headers["etag"]}
    assert world.client.get(hit["image_url"], headers=again).status_code == 304
    unversioned = world.client.get(hit["image_url"].partition("?")[0])
    assert unversioned.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        ({}, 400, "exactly one"),
        ({"text": "a", "vector": [1.0]}, 400, "exactly one"),
        ({"vector": [1.0, 2.0]}, 400, "2 numbers"),
        ({"vector": []}, 400, "0 numbers"),
        ({"vector": [0.0] * 16}, 400, "not all zero"),
        ({"vector": [float("nan")] * 16}, 400, "finite"),
        ({"vector": [1e999] * 16}, 400, "finite"),
        ({"vector": ["x"] * 16}, 422, "vector"),
        ({"text": "a", "k": 1001}, 422, "k"),
        ({"text": "a", "collection": "../toys"}, 404, "served here: toys"),
        ({"text": " "}, 400, "empty"),
        ({"image": "ftp://x/y.png"}, 400, "URL"),
    ],
)
def test_a_wrong_search_says_what_is_wrong(world: World, body, status, word):
    headers = {"Content-Type": "application/json"}  # json= refuses NaN
    response = world.client.post("/v1/search", content=json.dumps(body), headers=headers)
    assert response.status_code == status
    assert word in error(response)["message"]


# Collections


def test_items_are_added_found_replaced_and_deleted(own_world: World):
    put, get = own_world.client.put, own_world.client.get
    new = [encode(make_picture(seed=100 + i)) for i in range(2)]
    vectors = own_world.model.embed_images(new)
    items = [
        {"id": "a/b?c#d/image", "image": b64(new[0]), "caption": "odd", "metadata": {"x": 10**30}},
        {"id": "vector", "vector": (3 * vectors[1]).tolist()},
        {"id": "text", "text": "a red heart"},
    ]
    answer = put("/v1/collections/toys/items", json={"items": items})
    assert (answer.status_code, answer.json()["upserted"]) == (200, 3)
    found = own_world.post("/v1/search", image=b64(new[0]), k=1).json()["hits"][0]
    assert (found["id"], found["metadata"]) == ("a/b?c#d/image", {"x": 10**30})
    assert get(found["image_url"]).content[:2] == b"\xff\xd8"
    item_url = found["image_url"].rpartition("/image?")[0]
    assert get(item_url).json()["caption"] == "odd"
    assert own_world.post("/v1/search", image=b64(new[1]), k=1).json()["hits"][0]["id"] == "vector"
    assert get("/v1/collections/toys/items/vector/image").status_code == 404
    put("/v1/collections/toys/items", json={"items": [items[1] | {"caption": "new"}]})
    assert get("/v1/collections/toys/items/vector").json()["caption"] == "new"
    assert get("/v1/collections/toys").json()["count"] == COUNT + 3
    assert own_world.client.delete(item_url).json()["deleted"] == 1
    assert own_world.client.delete(item_url).status_code == 404
    assert get("/v1/collections/toys").json()["count"] == COUNT + 2


def test_an_acknowledged_write_is_on_disk(own_world: World, tmp_path: Path):
    item = {"id": "kept", "text": "x"}
    own_world.client.put("/v1/collections/toys/items", json={"items": [item]})
    with Collection.open(tmp_path / "toys", read_only=True) as other:
        assert other.contains(["kept"]) == {"kept"}


@pytest.mark.parametrize(
    ("items", "status", "word"),
    [
        ([], 400, "empty"),
        ([{"id": "n", "text": "x"}] * 2, 400, "items[1].id is given twice"),
        ([{"id": "n"}], 400, "exactly one"),
        ([{"id": "n", "text": "x", "vector": [1.0]}], 400, "exactly one"),
        ([{"id": "", "text": "x"}], 400, "items[0]"),
        ([{"id": "i" * 513, "text": "x"}], 400, "items[0]"),
        ([{"id": "n", "text": "x", "metadata": {"a": float("inf")}}], 400, "items[0]"),
        ([{"id": "n", "vector": [1.0] * 15}], 400, "items[0].vector"),
        ([{"id": "n", "vector": [float("nan")] * 16}], 400, "items[0].vector"),
        ([{"id": "good", "text": "x"}, {"id": "n", "image": "eHh4"}], 422, "items[1]"),
        ([{"id": "good", "text": "x"}, {"id": "n", "image": "http://x"}], 400, "items[1].image"),
    ],
)
def test_a_wrong_item_is_named_and_nothing_is_stored(world: World, items, status, word):
    headers = {"Content-Type": "application/json"}
    body = json.dumps({"items": items})
    response = world.client.put("/v1/collections/toys/items", content=body, headers=headers)
    assert response.status_code == status
    assert word in error(response)["message"]
    assert world.client.get("/v1/collections/toys").json()["count"] == COUNT


def test_items_are_listed_page_by_page(world: World):
    first = world.client.get("/v1/collections/toys/items?limit=5").json()["data"]
    after = {"limit": 100, "start_after": first[-1]["id"]}
    rest = world.client.get("/v1/collections/toys/items", params=after).json()["data"]
    ids = [item["id"] for item in first + rest]
    assert ids == sorted(f"toys/{i}" for i in range(COUNT))
    assert world.client.get("/v1/collections/toys/items?limit=0").status_code == 422


@pytest.mark.parametrize(
    "path",
    [
        "/v1/collections/nope",
        "/v1/collections/..%2Ftoys/items/x",
        "/v1/collections/toys/items/..%2F..%2F..%2Fetc%2Fpasswd",
        "/v1/collections/toys/items/..%2F..%2Fetc%2Fpasswd/image",
        "/v1/collections/toys/items/%00",
        "/v1/collections/toys/items/%FF%FE",
        "/v1/collections/toys/items/%FF/image",
        "/v1/models/nope",
        "/ui/..%2Fapp.py",
        "/ui/__init__.py",
        "/nothing",
    ],
)
def test_what_is_not_here_is_404(world: World, path):
    response = world.client.get(path)
    assert response.status_code == 404
    error(response)


def test_a_read_only_service_changes_nothing(tmp_path: Path, model_dir: Path):
    registry, app = build(tmp_path, model_dir, load_settings(read_only=True))
    with TestClient(app) as client:
        put = client.put("/v1/collections/toys/items", json={"items": [{"id": "a", "text": "b"}]})
        assert (put.status_code, error(put)["code"]) == (403, "forbidden")
        assert client.delete("/v1/collections/toys/items/toys%2F1").status_code == 403
        assert client.get("/v1/collections/toys").json()["count"] == COUNT
    registry.close()


# What every reply has


def test_replies_name_the_model_and_its_fingerprint(world: World):
    fingerprint = world.model.info.fingerprint
    replies = [
        world.post("/v1/embeddings", input="x"),
        world.post("/v1/classify", images=[b64(world.pictures[0])], labels=["a"]),
        world.post("/v1/search", text="x"),
        world.client.get("/v1/collections/toys"),
        world.client.get("/v1/collections/toys/items/toys%2F1"),
        world.client.get("/v1/models/tiny"),
    ]
    for response in replies:
        assert response.status_code == 200
        assert (response.json()["model"], response.json()["fingerprint"]) == ("tiny", fingerprint)
        assert response.headers["X-Clipserve-Model"] == "tiny"
        assert response.headers["X-Clipserve-Fingerprint"] == fingerprint
    (listed,) = world.client.get("/v1/models").json()["data"]
    assert (listed["id"], listed["fingerprint"]) == ("tiny", fingerprint)
    (listed,) = world.client.get("/v1/collections").json()["data"]
    assert (listed["name"], listed["count"]) == ("toys", COUNT)


def test_every_route_is_documented(world: World):
    schema = world.client.get("/openapi.json").json()
    documented = {(method, path) for path, ways in schema["paths"].items() for method in ways}
    assert documented == {
        ("post", "/v1/embeddings"),
        ("post", "/v1/classify"),
        ("post", "/v1/search"),
        ("get", "/v1/models"),
        ("get", "/v1/models/{name}"),
        ("get", "/v1/collections"),
        ("get", "/v1/collections/{name}"),
        ("get", "/v1/collections/{name}/items"),
        ("put", "/v1/collections/{name}/items"),
        ("get", "/v1/collections/{name}/items/{id}"),
        ("delete", "/v1/collections/{name}/items/{id}"),
        ("get", "/v1/collections/{name}/items/{id}/image"),
        ("get", "/health"),
        ("get", "/health/live"),
        ("get", "/health/ready"),
        ("get", "/metrics"),
    }
    body = schema["paths"]["/v1/search"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "multipart/form-data"}
    references = set(json.dumps(schema).split('"#/components/schemas/')[1:])
    for reference in references:
        assert reference.partition('"')[0] in schema["components"]["schemas"]
    assert world.client.get("/docs").status_code == 200


def test_health_and_metrics(world: World):
    assert world.client.get("/health/live").json() == {"status": "live"}
    assert world.client.get("/health/ready").json() == {"status": "ready"}
    health = world.client.get("/health").json()
    assert (health["status"], health["models"][0]["name"]) == ("ok", "tiny")
    world.post("/v1/embeddings", input="x")
    world.client.get("/no-such-path-of-a-client")
    text = world.client.get("/metrics").text
    assert 'clipserve_requests_total{method="POST",route="/v1/embeddings",status="200"}' in text
    assert 'clipserve_batch_size_count{kind="text",model="tiny"}' in text
    assert 'clipserve_queue_items{model="tiny"} 0.0' in text
    assert "no-such-path" not in text


def test_the_page_loads_nothing_from_elsewhere(world: World):
    page = world.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name in ("style.css", "app.js", "icon.svg"):
        assert f"ui/{name}" in page.text
        file = world.client.get(f"/ui/{name}")
        assert file.status_code == 200
        again = {"If-None-Match": file.headers["etag"]}
        assert world.client.get(f"/ui/{name}", headers=again).status_code == 304
    assert "//" not in page.text


# Poison: each is refused, and the service still answers


def huge_png() -> bytes:
    """20,000 x 20,000 pixels in a hundred bytes or so."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


BAD_PICTURES = {
    "truncated JPEG": encode(make_picture(), "JPEG")[:300],
    "text called jpg": b"this is not a picture",
    "20,000 x 20,000 pixels": huge_png(),
    "thin": encode(make_picture(3, 3000)),
    "one byte": b"\xff",
    "script": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_poisonous_picture_harms_nobody_else(world: World, name: str):
    poison = BAD_PICTURES[name]
    answers = [
        world.post("/v1/embeddings", input=[{"image": b64(poison)}]),
        world.post("/v1/classify", images=[data_uri(poison)], labels=["a", "b"]),
        world.client.post("/v1/classify", files={"files": poison}, data={"labels": "a,b"}),
        world.client.post("/v1/search", files={"file": poison}),
        world.client.put(
            "/v1/collections/toys/items", json={"items": [{"id": "p", "image": b64(poison)}]}
        ),
    ]
    for answer in answers:
        assert answer.status_code == 422
        assert error(answer)["code"] == "invalid_image"
        assert "0x" not in answer.text  # an address; Pillow's own messages hold one
    assert_it_answers(world)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/classify", "/v1/search"])
@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"null", "application/json", 422),
        (b'{"text": "\\ud800"}', "application/json", 400),
        (b"a=b", "application/x-www-form-urlencoded", 415),
        (b"{}", "", 415),
        (b"x" * (5 * 2**20), "application/json", 413),
    ],
)
def test_a_poisonous_body_harms_nobody_else(world: World, path, content, kind, status):
    response = world.client.post(path, content=content, headers={"Content-Type": kind})
    assert response.status_code == status
    error(response)
    assert len(response.content) < 500  # nothing is echoed
    assert_it_answers(world)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "multipart/form-data; boundary=x"),
        (b"--x\r\nnonsense", "multipart/form-data; boundary=x"),
        (b"abc", "multipart/form-data"),
        (
            b'--x\r\nContent-Disposition: form-data; name="evil"\r\n\r\n1\r\n--x--\r\n',
            "multipart/form-data; boundary=x",
        ),
    ],
)
def test_a_poisonous_form_harms_nobody_else(world: World, content, kind):
    for path in ("/v1/classify", "/v1/search"):
        response = world.client.post(path, content=content, headers={"Content-Type": kind})
        assert response.status_code in (400, 422)
        error(response)
    assert_it_answers(world)


def test_too_many_files_are_refused(world: World):
    files = [("files", (f"{i}.png", b"x")) for i in range(300)]
    response = world.client.post("/v1/classify", files=files, data={"labels": "a"})
    assert response.status_code == 400
    error(response)
    assert_it_answers(world)


def test_a_request_is_never_repeated_in_an_error(world: World):
    marker = "mArKeR"
    requests = [
        ("/v1/embeddings", {"input": marker, "model": marker}),
        ("/v1/embeddings", {"input": {marker: marker}}),
        ("/v1/embeddings", {"input": "x", "encoding_format": marker}),
        ("/v1/classify", {"images": [marker * 9], "labels": ["a"], "templates": marker}),
        ("/v1/classify", {"images": marker, "labels": {marker: 1}, marker: 1}),
        ("/v1/search", {"text": "x", "collection": marker}),
        ("/v1/search", {"vector": marker, "k": marker}),
    ]
    for path, body in requests:
        response = world.client.post(path, json=body)
        assert response.status_code >= 400
        assert marker not in response.text, path
    assert marker not in world.client.get(f"/{marker}").text


def test_a_wrong_method_has_the_same_body(world: World):
    response = world.client.delete("/v1/embeddings")
    assert (response.status_code, error(response)["code"]) == (405, "method_not_allowed")


def assert_it_answers(world: World) -> None:
    (item,) = world.post("/v1/embeddings", input="a cat").json()["data"]
    want = world.model.embed_texts(["a cat"])[0]
    np.testing.assert_allclose(item["embedding"], want, atol=1e-5)
    assert world.registry.models["tiny"].pipeline.batcher.open_items == 0


# Load and failure


def test_forty_mixed_requests_at_once_each_get_their_own_answer(world: World):
    texts = [f"text number {i} " * (i % 5 + 1) for i in range(10)]
    want = world.model.embed_texts(texts)
    head = world.model.zero_shot(LABELS)

    def ask(i: int) -> None:
        n = i // 4 % 10
        if i % 4 == 0:
            (item,) = world.post("/v1/embeddings", input=texts[n]).json()["data"]
            np.testing.assert_allclose(item["embedding"], want[n], atol=1e-5)
        elif i % 4 == 1:
            body = world.post("/v1/embeddings", input=[{"image": b64(world.pictures[n])}]).json()
            np.testing.assert_allclose(body["data"][0]["embedding"], world.vectors[n], atol=1e-5)
        elif i % 4 == 2:
            images = [b64(world.pictures[n]), b64(b"broken")]
            results = world.post("/v1/classify", images=images, labels=LABELS).json()["results"]
            best = results[0]["predictions"][0]["probability"]
            assert best == pytest.approx(head.classify([world.pictures[n]]).max(), abs=1e-5)
            assert "error" in results[1]
        else:
            check_hits(
                world,
                world.post("/v1/search", image=b64(world.pictures[n]), k=3),
                world.vectors[n],
                3,
            )

    with ThreadPoolExecutor(40) as pool:
        list(pool.map(ask, range(40)))
    assert world.registry.models["tiny"].pipeline.batcher.open_items == 0


def test_a_full_queue_gets_429_and_a_time_to_come_back(own_world: World):
    batcher = own_world.registry.models["tiny"].pipeline.batcher
    job = batcher.admit(own_world.registry.settings.max_queue_items)
    response = own_world.post("/v1/embeddings", input="x")
    assert (response.status_code, error(response)["code"]) == (429, "overloaded")
    assert int(response.headers["Retry-After"]) >= 1
    assert own_world.client.get("/health/ready").status_code == 200
    batcher.abandon(job)
    assert own_world.post("/v1/embeddings", input="x").status_code == 200


def break_pictures(model: Model, error: BaseException) -> Any:
    """Make the picture tower raise until the handle is removed."""

    def raise_it(*_: object) -> None:
        raise error

    return model.network.visual.register_forward_pre_hook(raise_it)


def test_an_exception_in_the_model_fails_its_batch_and_nothing_else(own_world: World):
    image = {"image": b64(encode(make_picture()))}
    handle = break_pictures(own_world.model, RuntimeError("secret detail"))
    failed = own_world.post("/v1/embeddings", input=[image])
    assert (failed.status_code, error(failed)["code"]) == (500, "model_failed")
    assert "secret" not in failed.text
    mixed = own_world.post("/v1/embeddings", input=[image, "a cat"], on_error="report").json()
    assert [item["index"] for item in mixed["data"]] == [1]
    handle.remove()
    assert own_world.post("/v1/embeddings", input=[image]).status_code == 200


def test_a_dead_model_thread_is_not_ready_and_comes_back(own_world: World):
    handle = own_world.model.network.transformer.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(SystemExit(1))
    )
    ready = own_world.client.get("/health/ready")
    assert (ready.status_code, error(ready)["code"]) == (503, "not_ready")
    assert own_world.client.get("/health/live").status_code == 200
    handle.remove()
    assert own_world.post("/v1/embeddings", input="x").status_code == 200
    assert (
        'clipserve_model_restarts_total{model="tiny"} 1.0' in own_world.client.get("/metrics").text
    )


def test_a_damaged_collection_is_reported_without_its_path(own_world: World, tmp_path: Path):
    own_world.registry.collections["toys"].searcher.close()
    response = own_world.post("/v1/search", text="x")
    assert (response.status_code, error(response)["code"]) == (500, "collection_failed")
    assert str(tmp_path) not in response.text
    assert own_world.post("/v1/embeddings", input="x").status_code == 200


# The process


def test_a_busy_port_is_known_before_a_model_is_loaded(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(clipserve.errors.ConfigError, match=f"port {port}: Address already"):
            serve([tmp_path / "no model"], [], load_settings(port=port))


SERVE = """
import logging, sys
from pathlib import Path
from service.app import serve
from service.settings import load_settings
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
serve([Path(sys.argv[1])], [], load_settings(port=0, collections_root=Path(sys.argv[2])))
"""


def test_serve_says_where_it_listens_and_ends_well(tmp_path: Path, model_dir: Path):
    registry, _ = build(tmp_path, model_dir, load_settings())
    registry.close()
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(model_dir), str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    log = ""
    for line in process.stderr:
        log += line
        if line.startswith("service.app ready at http://127.0.0.1:"):
            break
    else:
        pytest.fail(log)
    assert "tiny (" in line
    assert "toys" in line
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=20)[1]
    assert process.returncode == 0, rest
    assert "Traceback" not in rest
