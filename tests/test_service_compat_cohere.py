"""Cohere's /v2/embed and /v2/rerank."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import Toys, data_uri, from_b64, toys

from service import replies
from service.compat import cohere
from service.routes.encodings import Encoding, encode


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Toys]:
    with toys(tmp_path_factory.mktemp("cohere"), model_dir) as found:
        yield found


def test_texts_are_embedded(world: Toys):
    body = world.post(
        "/v2/embed", model="tiny", input_type="search_query", texts=["a cat", "a dog"]
    ).json()
    got = np.array(body["embeddings"]["float"])
    np.testing.assert_allclose(got, world.texts("a cat", "a dog"), atol=1e-5)
    assert body["texts"] == ["a cat", "a dog"]
    assert body["response_type"] == "embeddings_by_type"
    assert body["meta"]["billed_units"]["input_tokens"] == 8


def test_every_type_that_is_asked_for_is_answered(world: Toys):
    kinds = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    uris = [data_uri(picture) for picture in world.pictures[:2]]
    found = world.post("/v2/embed", images=uris, embedding_types=kinds).json()["embeddings"]
    assert list(found) == kinds
    np.testing.assert_allclose(found["float"], world.vectors[:2], atol=1e-5)
    np.testing.assert_allclose(from_b64(found["base64"]), world.vectors[:2], atol=1e-5)
    assert np.shape(found["ubinary"]) == (2, 2)


def test_a_type_is_made_once_and_away_from_the_event_loop(
    world: Toys, monkeypatch: pytest.MonkeyPatch
):
    made: list[tuple[str, str]] = []

    def noted(rows: np.ndarray, kind: Encoding) -> list[Any]:
        made.append((kind, threading.current_thread().name.partition("_")[0]))
        return encode(rows, kind)

    monkeypatch.setattr(cohere, "encode", noted)
    monkeypatch.setattr(replies, "_SMALL", 0)
    assert world.post("/v2/embed", texts=["a cat"], embedding_types=["int8"] * 6).status_code == 200
    pool = world.registry.pool.submit(threading.current_thread).result().name
    assert made == [("int8", pool.partition("_")[0])]


def test_inputs_mix_texts_and_pictures(world: Toys):
    picture = {"type": "image_url", "image_url": {"url": data_uri(world.pictures[2])}}
    inputs = [{"content": [picture]}, {"content": [{"type": "text", "text": "a cat"}]}]
    found = world.post("/v2/embed", inputs=inputs).json()["embeddings"]["float"]
    expected = np.stack([world.vectors[2], world.texts("a cat")[0]])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"texts": ["a"], "images": ["b"]}, None),
        ({"texts": []}, "texts"),
        ({"texts": ["a", " "]}, "texts[1]"),
        ({"texts": ["a"], "output_dimension": 8}, "output_dimension"),
        ({"texts": ["a"], "embedding_types": ["float16"]}, "embedding_types[0]"),
        ({"texts": ["a"], "embedding_types": ["float"] * 7}, "embedding_types"),
        ({"texts": ["a"], "truncate": "START"}, "truncate"),
        ({"texts": ["a", "long " * 50], "truncate": "NONE"}, "texts[1]"),
        ({"images": ["http://127.0.0.1/a.png"]}, "images[0]"),
        ({"images": ["data:image/png;base64,AAAA"]}, "images[0]"),
        ({"inputs": [{"content": []}]}, "inputs[0]"),
        ({"inputs": [{"content": [{"type": "text", "text": "a"}] * 2}]}, "inputs[0]"),
        ({"inputs": ["a"]}, "inputs[0]"),
        ({"inputs": [{"content": [{"type": "text", "text": 5}]}]}, "inputs[0]"),
    ],
)
def test_what_cannot_be_embedded_is_named(world: Toys, body: dict[str, Any], param: str | None):
    refused = world.post("/v2/embed", model="tiny", **body)
    assert 400 <= refused.status_code < 500
    assert world.error(refused)["param"] == param


def test_cut_texts_are_counted(world: Toys):
    assert world.post("/v2/embed", texts=["a", "long " * 50]).json()["truncated"] == 1


def test_documents_are_ranked(world: Toys):
    documents = ["a cat", "a dog", data_uri(world.pictures[0])]
    body = world.post(
        "/v2/rerank", model="tiny", query="a cat", documents=documents, top_n=2
    ).json()
    first = body["results"][0]
    assert (first["index"], len(body["results"])) == (0, 2)
    assert first["relevance_score"] == pytest.approx(1, abs=1e-5)
